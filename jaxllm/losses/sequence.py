"""Losses on hidden states and on whole rows: no logits.

Dimension letters: B batch, T length, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.config import ConfigError
from jaxllm.contract import STUDENT, Batch, Mean, Obs
from jaxllm.losses.core import LossTransform, Means, mean_of, need

type States = Callable[[Obs], Float[Array, "B T D"]]


# ------------------------------------------------------------------------------------ hidden states


def states(model: str = STUDENT, tap: str | None = None, layer: int = -1) -> States:
    """Where to read hidden states: a model's last ones, or one layer of one of its taps.

    Args:
      model: a name in `Obs`.
      tap: a name in `Obs.taps[model]`, [L B T D]; None is the final hidden states.
      layer: which layer of the tap.

    Raises:
      ConfigError: no such model or tap in `Obs`.
    """

    def read(obs: Obs) -> Float[Array, "B T D"]:
        if tap is None:
            return need(obs.hidden, model, "Obs.hidden")
        return need(obs.taps.get(model, {}), tap, f"Obs.taps['{model}']")[layer]

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


def per_token(f: Callable[[Array, Array], Float[Array, "B T"]], ours: States, theirs: States) -> LossTransform:
    """A loss of two [B T D] arrays (in float32), averaged over `loss_mask`; no gradient through `theirs`."""

    def leaf(obs: Obs) -> tuple[Mean, Means]:
        a, b = ours(obs), jax.lax.stop_gradient(theirs(obs))
        if a.shape != b.shape:
            raise ConfigError(
                f"hidden states of shape {a.shape} are compared with {b.shape}; project the student's to the teacher's width in the model"
            )
        mask = obs.batch.loss_mask.astype(jnp.float32)
        loss = f(a.astype(jnp.float32), b.astype(jnp.float32))
        return Mean(jnp.sum(jnp.where(mask != 0, mask * loss, 0.0)), jnp.sum(mask)), {}

    return mean_of(leaf, lambda batch: jnp.sum(batch.loss_mask, dtype=jnp.float32))


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
