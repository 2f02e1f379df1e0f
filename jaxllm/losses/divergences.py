"""Token losses against a teacher's distribution: how far the student's next-token probabilities are from another model's.

Teachers come in two forms. With the student's vocabulary, as hidden states and an unembedding under a
name in `Obs` (the annotator `teacher` puts them there); or as `TopK`, the k most probable tokens at the
student's positions and in its ids, in `Batch.extras`. A teacher with another tokenizer is always the second. Where both
exist under one name, the `TopK` is taken.

Every divergence is a sum over events of f(p, q), p the teacher's probability and q the student's. The events are the tokens; what a
`TopK` does not name is made into probabilities of tokens, or into one event more, by `tail`.

Dimension letters: B batch, c chunk of T, V vocabulary, k entries of a `TopK`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm import sharding
from jaxllm.config import ConfigError, nearest
from jaxllm.contract import STUDENT
from jaxllm.losses.vocab import TokenLoss, View

type Event = Callable[[Array, Array, Array], Array]
"""f(p, log p, log q), elementwise; log p is finite, also where p is 0."""

TAILS = ("renormalise", "drop", "uniform", "rest")
_LEAST = 1e-8
"""Of the probability that a `TopK` does not name: a stored one may have been rounded to 0, where reverse KL would be infinite."""


class TopK(NamedTuple):
    """A teacher's k most probable next tokens at each position of the student, in the student's ids.

    NumPy in the data workers that make it, JAX in a loss.
    """

    ids: Int[Array | np.ndarray, "*B k"]
    logp: Float[Array | np.ndarray, "*B k"]
    """Log-probabilities over the teacher's whole vocabulary; -inf marks an unused entry. Equal ids add up."""
    tail: Float[Array | np.ndarray, "*B"]
    """Probability of everything else."""

    def extras(self, name: str) -> dict[str, Any]:
        """As entries of `Batch.extras`, where a divergence from `name` finds them."""
        return {f"{name}/{field}": value for field, value in self._asdict().items()}


def forward_kl(
    teacher: str, temperature: float = 1.0, times_t_squared: bool = True, *, tail: str = "renormalise", shared: int | None = None
) -> TokenLoss:
    """KL(p_teacher || p_student) = sum_v p_T (log p_T - log p_S), both softmaxes at `temperature`.

    Args:
      teacher: a model in `Obs`, or the name of a `TopK` in `Batch.extras` (stored as `TopK.extras(name)`); no gradient reaches it.
      temperature: t, divides both models' logits. A `TopK` was made at 1.
      times_t_squared: multiply by t^2. The gradient with respect to logits shrinks as 1/t^2, so with the factor
        a term keeps its share beside others as t changes (arXiv:1503.02531, section 2). Without it this is the
        plain divergence. At t = 1 there is no difference.
      tail: what to do with the probability that a `TopK` does not name.
        renormalise: divide by the mass that is named; over-sharp for small k, and what FuseLLM does (arXiv:2401.10491 with its code).
        drop: the target sums to less than 1, the loss says nothing about the rest.
        uniform: spread it evenly over the other tokens.
        rest: one event more, all other tokens together, for the student likewise. The divergence between these coarser distributions
        is never more than that between the whole ones.
      shared: for two models of one tokenizer whose tables are padded to different sizes: entries from here on are no tokens, in
        either. None means that the vocabularies must be of one size.

    Raises:
      ConfigError: a temperature that is not positive, or not 1 with a `TopK`; another `tail`; models with different vocabularies.

    Source: arXiv:2407.14679, section 3; arXiv:2408.11796 (t = 1, and no cross-entropy beside it).
    """
    return _divergence(lambda p, log_p, log_q: p * (log_p - log_q), teacher, temperature, times_t_squared, tail, shared)


def reverse_kl(
    teacher: str, temperature: float = 1.0, times_t_squared: bool = True, *, tail: str = "rest", shared: int | None = None
) -> TokenLoss:
    """KL(p_student || p_teacher) = sum_v p_S (log p_S - log p_T). Arguments as of `forward_kl`. Source: arXiv:2306.08543.

    Raises:
      ConfigError: a `tail` that leaves tokens without probability, where this divergence is infinite.
    """
    if tail in ("drop", "renormalise"):
        raise ConfigError(
            f"reverse_kl is infinite where the teacher's probability is 0, as tail '{tail}' leaves it; use 'rest' or 'uniform'"
        )
    return _divergence(lambda _, log_p, log_q: jnp.exp(log_q) * (log_q - log_p), teacher, temperature, times_t_squared, tail, shared)


def jensen_shannon(
    teacher: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    times_t_squared: bool = True,
    *,
    tail: str = "rest",
    shared: int | None = None,
) -> TokenLoss:
    """beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S. Other arguments as of `forward_kl`.

    As beta goes to 0 it is beta times the forward KL, as beta goes to 1 it is (1 - beta) times the reverse one.

    Args:
      beta: the teacher's share of m, in (0, 1).

    Source: arXiv:2306.13649 (GKD), equation 2.
    """
    if not 0.0 < beta < 1.0:
        raise ConfigError(f"beta is {beta}; it must be between 0 and 1 (near 0 is forward KL, near 1 reverse KL: use those)")

    def f(p: Array, log_p: Array, log_q: Array) -> Array:
        q = jnp.exp(log_q)
        log_m = jnp.log(beta * p + (1.0 - beta) * q)  # q is never 0
        return beta * p * (log_p - log_m) + (1.0 - beta) * q * (log_q - log_m)

    return _divergence(f, teacher, temperature, times_t_squared, tail, shared)


def total_variation(
    teacher: str, temperature: float = 1.0, times_t_squared: bool = True, *, tail: str = "rest", shared: int | None = None
) -> TokenLoss:
    """1/2 sum_v |p_T - p_S|: the most that the two can differ in the probability of anything. Arguments as of `forward_kl`."""
    return _divergence(lambda p, _, log_q: 0.5 * jnp.abs(p - jnp.exp(log_q)), teacher, temperature, times_t_squared, tail, shared)


def soft_ce(teacher: str, tail: str = "renormalise", *, shared: int | None = None) -> TokenLoss:
    """-sum_v p_teacher log p_student: forward KL plus the teacher's entropy, so with the same gradient. Arguments as of `forward_kl`."""
    return _divergence(lambda p, _, log_q: -p * log_q, teacher, 1.0, True, tail, shared)


KINDS: dict[str, Callable[..., TokenLoss]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "soft_ce": soft_ce,
}
"""By name, as `distill.kind` gives it."""


def _divergence(f: Event, teacher: str, temperature: float, times_t_squared: bool, tail: str, shared: int | None) -> TokenLoss:
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be positive")
    if tail not in TAILS:
        raise ConfigError(f"tail is '{tail}'; it is one of {', '.join(TAILS)}{nearest(tail, TAILS)}")
    factor = temperature**2 if times_t_squared else 1.0

    def loss(view: View) -> Float[Array, "B c"]:
        if view.has_extras(f"{teacher}/ids"):
            if temperature != 1.0:
                raise ConfigError(
                    f"temperature is {temperature}, and teacher '{teacher}' comes as the {view.extras(f'{teacher}/ids').shape[-1]} most "
                    "probable tokens at temperature 1; use 1, or run the teacher in the step"
                )
            return _from_top_k(f, view, TopK(*(view.extras(f"{teacher}/{field}") for field in TopK._fields)), tail)
        real = view.vocab_ids() < _num_shared(view, teacher, shared)
        log_q, log_p = (_log_probs(view, name, temperature, shared) for name in (STUDENT, teacher))
        # 0 * -inf on padded vocabulary is NaN, in the gradient too: take those entries out before the product.
        log_q, log_p = jnp.where(real, log_q, 0.0), jnp.where(real, log_p, 0.0)
        return factor * jnp.sum(jnp.where(real, f(jnp.exp(log_p), log_p, log_q), 0.0), axis=-1)

    return loss


def _log_probs(view: View, name: str, temperature: float, shared: int | None) -> Float[Array, "B c V"]:
    """A model's log-probabilities, in rows as long as the student's, -inf where there is no token that both have."""
    if shared is None or (view.num_vocab() == view.num_vocab(name) == shared):
        return view.log_probs(name, temperature)
    logits, size = view.logits(name), view.logits().shape[-1]
    if (longer := logits.shape[-1] - size) > 0:
        logits = logits[..., :size]
    elif longer < 0:
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, -longer)), constant_values=-jnp.inf)
    return jax.nn.log_softmax(jnp.where(view.vocab_ids() < shared, logits / temperature, -jnp.inf), axis=-1)


def _num_shared(view: View, teacher: str, shared: int | None) -> int:
    """How many entries of the two vocabularies are the same tokens."""
    ours, theirs = view.num_vocab(), view.num_vocab(teacher)
    if shared is None and ours != theirs:
        raise ConfigError(
            f"teacher '{teacher}' has a vocabulary of {theirs} and the student of {ours}; a teacher with another tokenizer enters as TopK, "
            "already aligned to the student's tokens; where the tokenizer is the same and only padding differs, give `shared`, its size"
        )
    if shared is not None and shared > min(ours, theirs):
        raise ConfigError(
            f"shared is {shared}, and the student has {ours} entries and teacher '{teacher}' {theirs}; it is at most the smaller"
        )
    return ours if shared is None else shared


def _from_top_k(f: Event, view: View, top: TopK, tail: str) -> Float[Array, "B c"]:
    """The divergence from the k entries as a dense target of the chunk.

    A scatter into a constant, where a gather from logits would have to be differentiated, and would collect a sharded vocabulary.
    """
    named = jnp.exp(jnp.asarray(top.logp, jnp.float32))
    rest = jnp.maximum(jnp.asarray(top.tail, jnp.float32), _LEAST)
    if tail == "renormalise":
        mass = named.sum(axis=-1, keepdims=True)
        named = jnp.where(mass > 0, named / jnp.where(mass > 0, mass, 1.0), 0.0)
    real = view.vocab_ids() < view.num_vocab()
    rows, columns = jnp.ogrid[: named.shape[0], : named.shape[1]]
    into = sharding.constrain(jnp.zeros_like(view.logits()), "B T V")
    scatter = lambda values: into.at[rows[..., None], columns[..., None], top.ids].add(values, mode="drop")
    p = scatter(named)
    if tail == "uniform":
        others = real & ~(scatter((named > 0).astype(jnp.float32)) > 0)
        p = p + jnp.where(others, (rest / jnp.maximum(others.sum(axis=-1), 1))[..., None], 0.0)
    p = jax.lax.stop_gradient(p)
    log_q = jnp.where(real, view.log_probs(), 0.0)
    if tail != "rest":
        return _sum_over(f, p, log_q, real)
    is_named = p > 0
    others = real & ~is_named
    # The student's mass of the others: where it has none left (all are named), the event does not exist.
    exists = jnp.any(others, axis=-1)
    log_rest = jax.nn.logsumexp(jnp.where(others | ~exists[..., None], log_q, -jnp.inf), axis=-1)
    return _sum_over(f, p, log_q, is_named) + jnp.where(exists, _event(f, rest, log_rest), 0.0)


def _sum_over(f: Event, p: Array, log_q: Array, events: Array) -> Float[Array, "B c"]:
    return jnp.sum(jnp.where(events, _event(f, p, log_q), 0.0), axis=-1)


def _event(f: Event, p: Array, log_q: Array) -> Array:
    return f(p, jnp.log(jnp.where(p > 0, p, 1.0)), log_q)
