"""What a loss sees, made by hand: batches, and an `Obs` whose hidden states are its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.contract import STUDENT, Batch, Obs, Unembedding
from jaxllm.losses.vocab import over_vocab


def batch_of(labels: Any, mask: Any = None, **changes: Any) -> Batch:
    """From NumPy, so that nothing is compiled for it."""
    labels = np.asarray(labels)
    ones: Any = np.ones(labels.shape, np.int32)
    weights = np.ones(labels.shape, np.float32) if mask is None else np.asarray(mask, np.float32)
    return jax.tree.map(jnp.asarray, Batch(labels, labels, weights, ones, ones)).replace(**changes)  # type: ignore[arg-type]


def random_batch(rng: np.random.Generator, rows: int, length: int, num_vocab: int, **changes: Any) -> Batch:
    mask = (rng.random((rows, length)) < 0.7).astype(np.float32)
    mask[0, 0] = 1.0
    return batch_of(rng.integers(0, num_vocab, (rows, length)), mask, **changes)


def observe(logits: Any, batch: Batch | None = None, **others: Any) -> Obs:
    """A model whose hidden states are its logits: the unembedding is the identity. `others` are teachers' logits."""
    logits = {STUDENT: logits, **others}
    heads = {name: Unembedding({"kernel": jnp.eye(x.shape[-1])}, num_vocab=x.shape[-1]) for name, x in logits.items()}
    hidden = {name: jnp.asarray(x, jnp.float32) for name, x in logits.items()}
    return Obs(batch_of(np.zeros(logits[STUDENT].shape[:2], int)) if batch is None else batch, jnp.int32(0), hidden, heads)


def value(loss: Any, obs: Obs, params: Any = None) -> jax.Array:
    f = lambda obs: loss.update(obs, loss.init(params), loss.weigh(obs.batch))[0]
    return jax.jit(f)(obs)


def alone(terms: dict[str, Any], **others: Any) -> Callable[..., dict[str, tuple[jax.Array, jax.Array]]]:
    """(logits, batch) -> {name: (value, gradient with respect to logits)} of token losses, each alone; one program for all."""

    def one(term: Any, logits: jax.Array, batch: Batch) -> Any:
        return jax.value_and_grad(lambda x: value(over_vocab(loss=(1.0, term)), observe(x, batch, **others)))(logits)

    run = jax.jit(lambda logits, batch: {name: one(term, logits, batch) for name, term in terms.items()})
    return lambda logits, batch=None: run(jnp.asarray(logits, jnp.float32), batch or batch_of(np.zeros(np.shape(logits)[:2], int)))
