"""Token losses: functions `View -> Float[B c]`, to be weighed and summed by `over_vocab`. Those against a teacher: `divergences.py`.

Dimension letters: B batch, c chunk of T, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import ConfigError
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
