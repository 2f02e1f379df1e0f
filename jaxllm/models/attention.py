"""Attention: who sees whom, the dense reference, the merge of two parts, the key/value cache.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head size, P prefix length.
Query head n reads key/value head n // G.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.models.attention_blocked import attend_blocked
from jaxllm.models.layers import alibi_slopes, dropout
from jaxllm.sharding import current_mesh


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_segments", "k_segments", "q_positions", "k_positions", "prefix_mask", "bias"],
    meta_fields=["causal", "window", "alibi"],
)
@dataclass(frozen=True)
class Sight:
    """Which keys a query sees, and what is added to its scores. Everything is optional.

    Positions default to the index in the row, which is right for packed rows too: within one document
    the difference of two indices is the difference of their positions.
    """

    causal: bool = True
    window: int | None = None
    """A query at i sees keys 0 <= i - j < window (|i - j| < window when not causal)."""
    alibi: bool = False
    q_segments: Int[Array, "B T"] | None = None
    """Attend where segments are equal; segment 0 is padding and sees nothing."""
    k_segments: Int[Array, "B S"] | None = None
    q_positions: Int[Array, "B T"] | None = None
    k_positions: Int[Array, "B S"] | None = None
    """Negative marks an empty slot."""
    prefix_mask: Bool[Array, "B T"] | None = None
    """Prefix-LM: marked positions of one segment see each other both ways."""
    bias: Float[Array, "#B #N T S"] | None = None
    """Added to the scores of all layers."""

    def distance(self, length: int, num_keys: int) -> Int[Array, "#B T S"]:
        """i − j for every query and key."""
        q = jnp.arange(length)[None] if self.q_positions is None else self.q_positions
        k = jnp.arange(num_keys)[None] if self.k_positions is None else self.k_positions
        return q[:, :, None] - k[:, None, :]

    def mask(self, length: int, num_keys: int) -> Bool[Array, "#B T S"] | None:
        """True where a query sees a key; None where everybody sees everything."""
        parts: list[Array] = []
        distance = self.distance(length, num_keys)
        if self.causal:
            visible = distance >= 0
            if self.prefix_mask is not None:
                visible |= self.prefix_mask[:, :, None] & self.prefix_mask[:, None, :]
            parts.append(visible)
        if self.window is not None:
            parts.append(jnp.abs(distance) < self.window)
        if self.k_positions is not None:
            parts.append(jnp.broadcast_to(self.k_positions[:, None, :] >= 0, (self.k_positions.shape[0], length, num_keys)))
        if self.q_segments is not None and self.k_segments is not None:
            same = self.q_segments[:, :, None] == self.k_segments[:, None, :]
            parts.append(same & (self.k_segments[:, None, :] > 0))
        if not parts:
            return None
        visible = parts[0]
        for part in parts[1:]:
            visible = visible & part
        return visible


def attend_dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sight: Sight,
    *,
    scale: float,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    dtype: str = "float32",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """softmax(scale · q kᵀ + bias) v with every feature, in O(T·S) memory; and the log-sum-exp of the scores.

    This is the reference that every faster kernel is tested against. A query that sees no key gets
    zeros and −inf.

    Args:
      dtype: type of the matmul operands; scores, softmax and sums are float32.
    """
    (batch, length, num_heads, size), (num_keys, num_kv_heads) = q.shape, k.shape[1:3]
    operand = partial(jnp.asarray, dtype=dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    einsum = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    grouped = operand(q).reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, size)
    scores = einsum("BTKGH,BSKH->BKGTS", grouped, operand(k)) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if sight.alibi:
        slopes = alibi_slopes(num_heads).reshape(num_kv_heads, -1)
        scores -= slopes[:, :, None, None] * jnp.abs(sight.distance(length, num_keys))[:, None, None].astype(jnp.float32)
    if sight.bias is not None:
        bias = jnp.broadcast_to(sight.bias, (sight.bias.shape[0], num_heads, length, num_keys))
        scores += bias.reshape(bias.shape[0], num_kv_heads, -1, length, num_keys)
    mask = sight.mask(length, num_keys)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weights.sum(-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, jnp.log(total) + jnp.where(seen, top, 0.0), -jnp.inf)
    weights = dropout(weights / total, dropout_rate, key)
    out = einsum("BKGTS,BSKH->BTKGH", operand(weights), operand(v))
    lse = lse[..., 0].transpose(0, 3, 1, 2).reshape(batch, length, num_heads)
    return out.reshape(q.shape).astype(q.dtype), lse


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sight: Sight,
    *,
    scale: float,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    dtype: str = "float32",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`attend_dense`, by whatever is fastest here for these features: see `kernel`."""
    dropping = dropout_rate > 0 and key is not None
    if kernel(sight, q.shape[1], dropping) == "blocked":
        return attend_blocked(
            q, k, v, q_segments=sight.q_segments, k_segments=sight.k_segments, bias=sight.bias,
            slopes=alibi_slopes(q.shape[2]) if sight.alibi else None,
            causal=sight.causal, window=sight.window, scale=scale, soft_cap=soft_cap, dtype=dtype,
        )  # fmt: skip
    return attend_dense(q, k, v, sight, scale=scale, soft_cap=soft_cap, dropout_rate=dropout_rate, key=key, dtype=dtype)


def kernel(sight: Sight, length: int, dropping: bool = False) -> str:
    """Which implementation runs: 'blocked' or 'dense'.

    blocked   one device, whole rows without dropout, cache positions or prefix-LM: never holds T × S scores
    dense     everything else: on a mesh, where the partitioner splits its einsums over heads and rows; a step of decoding;
              short rows, where T × S is small
    """
    plain = sight.q_positions is None and sight.k_positions is None and sight.prefix_mask is None and not dropping
    return "blocked" if plain and length >= BLOCKED_FROM and current_mesh() is None else "dense"


BLOCKED_FROM = 128
"""Query length from which blocks pay off."""


def merge(
    a: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]], b: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention over the union of two disjoint sets of keys, from (output, log-sum-exp) over each.

    out = Σ exp(lse_i − lse) · out_i,  lse = log Σ exp(lse_i). Parts that saw nothing count nothing.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    safe = jnp.where(jnp.isfinite(lse), lse, 0.0)
    weight_a, weight_b = jnp.exp(lse_a - safe)[..., None], jnp.exp(lse_b - safe)[..., None]
    return (weight_a * out_a + weight_b * out_b).astype(out_a.dtype), lse


# ------------------------------------------------------------------------------------------- cache


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "positions"], meta_fields=["empty"])
@dataclass(frozen=True)
class Cache:
    """Keys and values of the past. One array per entry of the layer pattern, since a window needs fewer slots.

    A window of w keeps a ring of w slots: position p lies in slot p mod w.
    """

    keys: tuple[Float[Array, "_ B _ K H"], ...]
    """After the rotary embedding."""
    values: tuple[Float[Array, "_ B _ K H"], ...]
    positions: tuple[Int[Array, "B _"], ...]
    """Position held by each slot; −1 is empty."""
    empty: bool = True
    """Known when tracing: the first call has no past to attend to."""


def write_slots(slots: Float[Array, "B S K H"], new: Float[Array, "B T K H"], index: Int[Array, "B T"]) -> Float[Array, "B S K H"]:
    """`slots` with row b's new entries at `index[b]`; an index beyond the last slot writes nothing."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return slots.at[rows, index].set(new.astype(slots.dtype), mode="drop")


def slot_index(positions: Int[Array, "B T"], valid: Bool[Array, "B T"], num_slots: int) -> Int[Array, "B T"]:
    """Slot of each new token; `num_slots`, which writes nothing, for padding and for what a later token of this call overwrites."""
    last = jnp.where(valid, positions, -1).max(1, keepdims=True)
    keep = valid & (positions > last - num_slots)
    return jnp.where(keep, positions % num_slots, num_slots)
