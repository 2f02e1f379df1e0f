"""Token losses: functions `View -> Float[B c]`, to be weighed and summed by `over_vocab`.

Teachers come in two forms. With the student's vocabulary, as hidden states and an unembedding under a
name in `Obs` (the annotator `teacher` puts them there); or as `TopK`, the k most probable tokens at the
student's positions and in its ids, in `Batch.extras`. A teacher with another tokenizer is always the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm import sharding
from jaxllm.config import ConfigError
from jaxllm.contract import STUDENT
from jaxllm.losses.vocab import TokenLoss, View


def next_token(label_smoothing: float = 0.0) -> TokenLoss:
    """-log p(label); with smoothing e, the cross-entropy against (1 - e) * onehot + e / V.

    Source: label smoothing arXiv:1512.00567, section 7, over the logical vocabulary.
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
