"""What a model expects of every position, by its most probable tokens; [B T V] never exists.

Letters: B rows, T positions, K most probable tokens, c positions of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.contract import LM, Batch, Params
from jaxllm.losses.vocab import DEFAULT_CHUNK

type Expected = tuple[Int[Array, "B T k"], Float[Array, "B T k"], Float[Array, "B T"], Float[Array, "B T"]]
"""The fields of `taught.Best`."""


def best_of(lm: LM, k: int) -> Callable[[Params, Batch], Expected]:
    """(params, batch) -> what `taught.Best` holds of every position; never [B T V]."""

    def of_chunk(params: Params, part: tuple[Float[Array, "B c D"], Int[Array, "B c"]]) -> tuple[Array, Array, Array, Array]:
        hidden, labels = part
        logits = lm.unembed(params).logits(hidden)
        best, ids = jax.lax.top_k(logits, k)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # The rest by its own sum: 1 - sum(p) would be rounding noise where the named ones are nearly all.
        rest = jnp.where(logits >= best[..., -1:], -jnp.inf, logits)
        tied = jnp.sum(logits == best[..., -1:], -1) - jnp.sum(best == best[..., -1:], -1)
        tail = jnp.exp(jax.nn.logsumexp(rest, axis=-1) - log_z) + tied * jnp.exp(best[..., -1] - log_z)
        is_label = jax.lax.iota(jnp.int32, logits.shape[-1]) == labels[..., None]  # by select-and-sum: a divided vocabulary stays local
        return ids, best - log_z[..., None], tail, jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1) - log_z

    def apply(params: Params, batch: Batch) -> Expected:
        hidden = lm(params, batch).hidden
        length = hidden.shape[1]
        num = -(-length // DEFAULT_CHUNK)
        size = -(-length // num)
        pad = lambda x: jnp.pad(x, ((0, 0), (0, num * size - length), *((0, 0),) * (x.ndim - 2)))
        cut = lambda x: jnp.moveaxis(pad(x).reshape(x.shape[0], num, size, *x.shape[2:]), 1, 0)
        out = jax.lax.map(partial(of_chunk, params), (cut(hidden), cut(jnp.asarray(batch.labels))))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(hidden.shape[0], num * size, *x.shape[3:])[:, :length], out)

    return apply
