"""Losses on hidden states and on whole rows: no logits.

Dimension letters: B batch, T length, D model width, L layers, N query heads, K key heads, H head size, R heads cut anew, E their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.config import ConfigError
from jaxllm.contract import STUDENT, Batch, Mean, Obs
from jaxllm.losses.core import LossTransform, Means, mean_of, need

type States = Callable[[Obs], Float[Array, "*P B T D"]]
"""Reads hidden states; those of several layers have a dimension P in front, and a loss is its mean over it."""


# ------------------------------------------------------------------------------------ hidden states


def states(model: str = STUDENT, tap: str | None = None, layer: int | Sequence[int] | None = -1) -> States:
    """Where to read hidden states: a model's last ones, or layers of one of its taps.

    Args:
      model: a name in `Obs`.
      tap: a name in `Obs.taps[model]`, [L B T D]; None is the final hidden states.
      layer: which layer of the tap, or which ones; None is all.

    Raises:
      ConfigError: no such model or tap in `Obs`.
    """

    def read(obs: Obs) -> Float[Array, "*P B T D"]:
        if tap is None:
            return need(obs.hidden, model, "Obs.hidden")
        stack = need(obs.taps.get(model, {}), tap, f"Obs.taps['{model}']")
        if layer is None:
            return stack
        return stack[layer] if isinstance(layer, int) else jnp.stack([stack[i] for i in layer])

    return read


def mse(ours: States, theirs: States) -> LossTransform:
    """Mean over masked positions of mean_d (ours - theirs)^2; no gradient through `theirs`."""
    return per_token(lambda a, b: jnp.mean(jnp.square(a - b), axis=-1), ours, theirs)


def cosine(ours: States, theirs: States) -> LossTransform:
    """Mean over masked positions of 1 - cos(ours, theirs); no gradient through `theirs`.

    Source: arXiv:2407.14679, section 3 (intermediate states; a projection student -> teacher belongs to the model's tree).
    """

    def loss(a: Array, b: Array) -> Array:
        # rsqrt of a clipped sum of squares, so that a zero vector (padding) has a finite gradient.
        norm = lambda x: jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1), 1e-16))
        return 1.0 - jnp.sum(a * b, axis=-1) * norm(a) * norm(b)

    return per_token(loss, ours, theirs)


def per_token(f: Callable[[Array, Array], Float[Array, "*P B T"]], ours: States, theirs: States) -> LossTransform:
    """A loss of two [… B T D] arrays (in float32), averaged over `loss_mask`; no gradient through `theirs`."""

    def leaf(obs: Obs) -> tuple[Mean, Means]:
        a, b = ours(obs), jax.lax.stop_gradient(theirs(obs))
        if a.shape != b.shape:
            raise ConfigError(
                f"hidden states of shape {a.shape} are compared with {b.shape}; project the student's to the teacher's width in the model"
            )
        mask = obs.batch.loss_mask.astype(jnp.float32)
        loss = f(a.astype(jnp.float32), b.astype(jnp.float32))
        loss = loss.mean(axis=tuple(range(loss.ndim - mask.ndim)))
        return Mean(jnp.sum(jnp.where(mask != 0, mask * loss, 0.0)), jnp.sum(mask)), {}

    return mean_of(leaf, lambda batch: jnp.sum(batch.loss_mask, dtype=jnp.float32))


def attention_kl(
    pairs: Sequence[tuple[int, int]], teacher: str, *, heads: int | None = None, scales: tuple[float | None, float | None] = (None, None)
) -> LossTransform:
    """KL(A_teacher || A_student) between attention distributions, the mean over heads, pairs of layers and masked queries.

    Needs the taps q [L B T N H] and k [L B T K H] of both models (after norms and rotation, as attention multiplies them). Scores exist
    for `ATTENTION_CHUNK` queries at a time, and are computed again on the way back.

    Args:
      pairs: (student's layer, teacher's).
      heads: cut all N·H numbers of a query into this many heads, in both models (MiniLM v2's relation heads); None takes the heads as
        they are, of which both must have the same number.
      scales: of the scores of (student, teacher); None is 1 / √(size of a head).

    Raises:
      ConfigError: numbers of heads that differ, or do not divide.

    Source: arXiv:2002.10957, section 3.1; arXiv:2012.15828, section 3 (heads cut anew).
    """

    def leaf(obs: Obs) -> tuple[Mean, Means]:
        read = lambda model: (need(obs.taps.get(model, {}), name, f"Obs.taps['{model}']") for name in "qk")
        (q, k), (teacher_q, teacher_k) = read(STUDENT), jax.lax.stop_gradient(tuple(read(teacher)))
        number = heads or q.shape[3]
        for name, one in ((STUDENT, q), (teacher, teacher_q)):
            if (one.shape[3] * one.shape[4]) % number or (heads is None and one.shape[3] != number):
                raise ConfigError(
                    f"attention of {number} heads is asked for, and '{name}' has {one.shape[3]} of {one.shape[4]}; give `heads`, a divisor "
                    f"of both {q.shape[3] * q.shape[4]} and {teacher_q.shape[3] * teacher_q.shape[4]}"
                )
        mask = obs.batch.loss_mask.astype(jnp.float32)
        loss = jnp.zeros(mask.shape)
        for ours, theirs in pairs:
            student = _in_heads(q[ours], k[ours], number, scales[0])
            loss += _attention_kl(student, _in_heads(teacher_q[theirs], teacher_k[theirs], number, scales[1]), obs.batch.segment_ids)
        return Mean(jnp.sum(mask * loss) / len(pairs), jnp.sum(mask)), {}

    return mean_of(leaf, lambda batch: jnp.sum(batch.loss_mask, dtype=jnp.float32))


ATTENTION_CHUNK = 128


def _in_heads(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], heads: int, scale: float | None
) -> tuple[Float[Array, "B T R E"], Float[Array, "B T R E"]]:
    """Queries, scaled, and keys, one for each query head, cut into `heads` heads; float32."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    q, k = (x.astype(jnp.float32).reshape(*x.shape[:2], heads, -1) for x in (q, k))
    return q * (q.shape[-1] ** -0.5 if scale is None else scale), k


def _attention_kl(student: tuple[Array, Array], teacher: tuple[Array, Array], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Of each query, the mean over heads; a query sees its own segment up to itself."""
    length = segments.shape[1]
    num = -(-length // ATTENTION_CHUNK)
    size = -(-length // num)

    @jax.checkpoint
    def chunk(start: Array) -> Float[Array, "B c"]:
        index = jnp.minimum(start + jnp.arange(size), length - 1)  # the last chunk may repeat the last query
        seen = (segments[:, index, None] == segments[:, None, :]) & (index[:, None] >= jnp.arange(length))
        scores = (jnp.einsum("BTRE,BSRE->BRTS", q[:, index], k, precision="highest") for q, k in (student, teacher))
        log_q, log_p = (jax.nn.log_softmax(jnp.where(seen[:, None], x, -1e30), axis=-1) for x in scores)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).mean(axis=1)

    return jnp.moveaxis(jax.lax.map(chunk, jnp.arange(num) * size), 0, 1).reshape(segments.shape[0], -1)[:, :length]


# ---------------------------------------------------------------------------------------- rankings


def pairwise_ranking(score: str = "reward", rank: str = "rank") -> LossTransform:
    """Bradley–Terry over the rows of each group: mean over groups of mean over pairs of -log sigmoid(r_better - r_worse).

    Rows with one `Batch.group` number are one prompt's answers. `Batch.extras[rank]` (Int[B], smaller is better,
    equal is a tie and makes no pair) orders them; without it the earlier row is the better one. A row without
    any loss_mask is padding. Every group counts once, however many pairs it has: all pairs of a prompt are
    one batch element, and cost one forward pass per answer.

    Args:
      score: a name in `Obs.scores`: Float[B], or Float[B T], read at the row's last position that has loss_mask.
      rank: a name in `Batch.extras`.

    Metrics: `accuracy`, the share of pairs that the scores order rightly, averaged as the loss is.

    Source: arXiv:2203.02155, section 3.4, equation 1.
    """

    def leaf(obs: Obs) -> tuple[Mean, Means]:
        scores = need(obs.scores, score, "Obs.scores").astype(jnp.float32)
        if scores.ndim == 2:
            scores = jnp.sum(jnp.where(_last(obs.batch.loss_mask), scores, 0.0), axis=1)
        margin = scores[:, None] - scores[None, :]
        weights = _pair_weights(obs.batch, rank)
        total = lambda values: Mean(jnp.sum(jnp.where(weights > 0, weights * values, 0.0)), jnp.sum(weights))
        return total(-jax.nn.log_sigmoid(margin)), {"accuracy": total((margin > 0).astype(jnp.float32))}

    return mean_of(leaf, lambda batch: jnp.sum(_pair_weights(batch, rank)))


def _pair_weights(batch: Batch, rank: str) -> Float[Array, "B B"]:
    """[better, worse] -> 1 / number of pairs in the group, 0 where the two make no pair. Sums to the number of groups."""
    if batch.group is None:
        raise ConfigError("pairwise_ranking needs Batch.group: rows with one number are one prompt's answers")
    order = batch.extras.get(rank, jnp.arange(batch.group.shape[0]))
    real: Bool[Array, " B"] = jnp.any(batch.loss_mask > 0, axis=1)
    together = (batch.group[:, None] == batch.group[None, :]) & real[:, None] & real[None, :]
    pairs = (together & (order[:, None] < order[None, :])).astype(jnp.float32)
    in_group = together.astype(jnp.float32) @ pairs.sum(axis=1)
    return pairs / jnp.maximum(in_group, 1.0)[:, None]


def _last(mask: Float[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at each row's last position with mask > 0, and nowhere in a row without one."""
    index = jnp.arange(mask.shape[1])
    return index == jnp.max(jnp.where(mask > 0, index, -1), axis=1, keepdims=True)
