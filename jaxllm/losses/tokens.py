"""Token losses: functions `View -> Float[B c]`, to be weighed and summed by `over_vocab`.

Teachers come in two forms. With the student's vocabulary, as hidden states and an unembedding under a
name in `Obs` (the annotator `teacher` puts them there); or as `TopK`, the k most probable tokens at the
student's positions and in its ids, in `Batch.extras`. A teacher with another tokenizer is always the second.

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


def next_token(label_smoothing: float = 0.0) -> TokenLoss:
    """-log p(label); with smoothing e, the cross-entropy against (1 - e) * onehot + e / V.

    Args:
      label_smoothing: e, spread over the logical vocabulary. Source: arXiv:1512.00567, section 7.

    Raises:
      ConfigError: e outside [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")

    def loss(view: View) -> Float[Array, "B c"]:
        if label_smoothing == 0.0:
            return view.log_z() - view.label_logit()
        real = view.vocab_ids() < view.num_vocab()
        mean_logit = jnp.sum(jnp.where(real, view.logits(), 0.0), axis=-1) / view.num_vocab()
        return view.log_z() - (1.0 - label_smoothing) * view.label_logit() - label_smoothing * mean_logit

    return loss


def z_loss() -> TokenLoss:
    """(log Z)^2, which keeps the softmax normaliser near 1. Source: arXiv:2204.02311, section 5 (coefficient 1e-4)."""
    return lambda view: jnp.square(view.log_z())


def forward_kl(teacher: str, temperature: float = 1.0, times_t_squared: bool = True) -> TokenLoss:
    """KL(p_teacher || p_student) = sum_v p_T (log p_T - log p_S), both softmaxes at `temperature`.

    Args:
      teacher: a name in `Obs`; no gradient reaches it.
      temperature: t, divides both models' logits.
      times_t_squared: multiply by t^2. The gradient with respect to logits shrinks as 1/t^2, so with the factor
        a term keeps its share beside others as t changes (arXiv:1503.02531, section 2). Without it this is the
        plain divergence. At t = 1 there is no difference.

    Raises:
      ConfigError: a temperature that is not positive; models with different vocabularies.

    Source: arXiv:2407.14679, section 3; arXiv:2408.11796 (t = 1, and no cross-entropy beside it).
    """
    return _divergence(lambda ours, theirs: (theirs, ours), teacher, temperature, times_t_squared)


def reverse_kl(teacher: str, temperature: float = 1.0, times_t_squared: bool = True) -> TokenLoss:
    """KL(p_student || p_teacher) = sum_v p_S (log p_S - log p_T). Arguments as of `forward_kl`. Source: arXiv:2306.08543."""
    return _divergence(lambda ours, theirs: (ours, theirs), teacher, temperature, times_t_squared)


def _divergence(order: Callable[[Array, Array], tuple[Array, Array]], teacher: str, temperature: float, times_t_squared: bool) -> TokenLoss:
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be positive")
    factor = temperature**2 if times_t_squared else 1.0

    def loss(view: View) -> Float[Array, "B c"]:
        _check_same_vocab(view, teacher)
        # 0 * -inf on padded vocabulary is NaN, in the gradient too: take those entries out before the product.
        real = view.vocab_ids() < view.num_vocab()
        p, q = order(*(jnp.where(real, view.log_probs(name, temperature), 0.0) for name in (STUDENT, teacher)))
        return factor * jnp.sum(jnp.where(real, jnp.exp(p) * (p - q), 0.0), axis=-1)

    return loss


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
        """As entries of `Batch.extras`, where `soft_ce(name)` finds them."""
        return {f"{name}/{field}": value for field, value in self._asdict().items()}


def soft_ce(teacher: str, tail: str = "renormalise") -> TokenLoss:
    """-sum_v p_teacher log p_student: forward KL plus the teacher's entropy, so with forward KL's gradient.

    Args:
      teacher: a model in `Obs`, or the name of a `TopK` in `Batch.extras` (stored as `TopK.extras(name)`), which
        is taken where both exist.
      tail: what to do with the probability that a `TopK` does not name. drop: the target sums to less than 1, the
        loss says nothing about the rest. renormalise: divide by the mass that is named; over-sharp for small k, and
        what FuseLLM does (arXiv:2401.10491 with its code). uniform: spread it evenly over the other tokens.

    Raises:
      ConfigError: another `tail`; models with different vocabularies.
    """
    choices = ("drop", "renormalise", "uniform")
    if tail not in choices:
        raise ConfigError(f"tail is '{tail}'; it is one of {', '.join(choices)}{nearest(tail, choices)}")

    def loss(view: View) -> Float[Array, "B c"]:
        if view.has_extras(f"{teacher}/ids"):
            return _soft_ce_top_k(view, TopK(*(view.extras(f"{teacher}/{field}") for field in TopK._fields)), tail)
        _check_same_vocab(view, teacher)
        real = view.vocab_ids() < view.num_vocab()
        return view.log_z() - jnp.sum(jnp.exp(view.log_probs(teacher)) * jnp.where(real, view.logits(), 0.0), axis=-1)

    return loss


def _soft_ce_top_k(view: View, top: TopK, tail: str) -> Float[Array, "B c"]:
    p = jnp.exp(jnp.asarray(top.logp, jnp.float32))
    rest = jnp.zeros(p.shape[:-1])
    if tail == "renormalise":
        mass = p.sum(axis=-1, keepdims=True)
        p = jnp.where(mass > 0, p / jnp.where(mass > 0, mass, 1.0), 0.0)
    real = view.vocab_ids() < view.num_vocab()
    # The k entries as a dense target of the chunk: a scatter into a constant, where a gather from logits would
    # have to be differentiated, and would collect a sharded vocabulary.
    rows, columns = jnp.ogrid[: p.shape[0], : p.shape[1]]
    into = sharding.constrain(jnp.zeros_like(view.logits()), "B T V")
    scatter = lambda values: into.at[rows[..., None], columns[..., None], top.ids].add(values, mode="drop")
    target = scatter(p)
    if tail == "uniform":
        others = real & ~(scatter((p > 0).astype(jnp.float32)) > 0)
        rest = jnp.asarray(top.tail, jnp.float32) / jnp.maximum(others.sum(axis=-1), 1)
        target = target + jnp.where(others, rest[..., None], 0.0)
    log_probs = jnp.where(real, view.log_probs(), 0.0)
    return -jnp.sum(jax.lax.stop_gradient(target) * log_probs, axis=-1)


def from_optax(f: Callable[[Array, Array], Array], one_hot: bool = False) -> TokenLoss:
    """Any `optax.losses` function of (logits, labels) as a token loss.

    Args:
      f: (Float[B c V], labels) -> Float[B c], on the logical vocabulary. If it gathers from V, a vocabulary
        sharded over `model` is communicated: `next_token` does not.
      one_hot: labels as Float[B c V] instead of Int[B c].

    >>> import optax
    >>> focal = from_optax(lambda logits, labels: optax.losses.sigmoid_focal_loss(logits, labels).sum(-1), one_hot=True)
    """

    def loss(view: View) -> Float[Array, "B c"]:
        size = view.num_vocab()
        logits = view.logits()
        logits = logits if logits.shape[-1] == size else logits[..., :size]
        return f(logits, jax.nn.one_hot(view.labels, size) if one_hot else view.labels)

    return loss


def accuracy() -> TokenLoss:
    """1 where no token is more probable than the label, else 0: a metric, to be used with coefficient 0.0."""
    return lambda view: (view.label_logit() >= jnp.max(view.logits(), axis=-1)).astype(jnp.float32)


def _check_same_vocab(view: View, teacher: str) -> None:
    if view.num_vocab(teacher) != view.num_vocab():
        raise ConfigError(
            f"teacher '{teacher}' has a vocabulary of {view.num_vocab(teacher)} and the student of {view.num_vocab()}; "
            "a teacher with another tokenizer enters as TopK, already aligned to the student's tokens"
        )
