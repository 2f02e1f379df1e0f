"""Attention: who sees whom, the dense reference, the merge of two parts, the key/value cache.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head size, P prefix length.
Query head n reads key/value head n // G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxllm.models.attention_blocked import attend_blocked
from jaxllm.models.attention_gpu import attend_cudnn, attend_tokamax
from jaxllm.models.attention_kernels import WHOLE_ROWS, Case, choose, features, scores_per_device
from jaxllm.models.attention_sequence import attend_sequence
from jaxllm.models.attention_sequence import merge as merge
from jaxllm.models.attention_splash import attend_splash
from jaxllm.models.layers import alibi_slopes, dropout
from jaxllm.sharding import AXES, BATCH_AXES, axis_size, current_mesh, free_axes, in_pieces, platform


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
    slopes: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """softmax(scale · q kᵀ + bias) v with every feature, in O(T·S) memory; and the log-sum-exp of the scores.

    This is the reference that every faster kernel is tested against. A query that sees no key gets
    zeros and −inf.

    Args:
      dtype: type of the matmul operands; scores, softmax and sums are float32.
      slopes: of ALiBi; None means those of `q`'s number of heads.
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
        slopes = (alibi_slopes(num_heads) if slopes is None else slopes).reshape(num_kv_heads, -1)
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
    out = einsum("BKGTS,BSKH->BKGTH", operand(weights), operand(v)).transpose(0, 3, 1, 2, 4)  # else XLA:CPU transposes v, not this
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
    shard_sequence: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`attend_dense`, by the kernel that `attention_kernels.choose` names for these features on the mesh's platform.

    Args:
      shard_sequence: T and S lie on the mesh axis `model`, and so does the output: see `attention_sequence.py`. A step of
        decoding, a length that the axis does not divide and the features in `WHOLE_ROWS` run on whole rows all the same.

    Raises:
      ConfigError: on an accelerator, long rows with a feature that no kernel there has.
    """
    if key is None:
        dropout_rate = 0.0
    case = describe(q, k, sight, soft_cap=soft_cap, dropout=dropout_rate > 0, dtype=dtype)
    local = partial(attend_local, scale=scale, soft_cap=soft_cap, dtype=dtype)
    if shard_sequence and q.shape[1] == k.shape[1] and in_pieces(q.shape[1]) and not case.features & WHOLE_ROWS:
        return attend_sequence(local, case, q, k, v, sight, scale=scale, soft_cap=soft_cap, dtype=dtype)
    kernel = choose(case)
    if kernel == "dense":
        out, lse = attend_dense(q, k, v, sight, scale=scale, soft_cap=soft_cap, dropout_rate=dropout_rate, key=key, dtype=dtype)
        return checkpoint_name(out, "attention_heads"), lse  # kernels with a backward pass of their own name what they save
    return on_mesh(partial(local, kernel), q, k, v, sight)


def describe(q: Array, k: Array, sight: Sight, *, soft_cap: float | None, dropout: bool, dtype: str) -> Case:
    """What a call asks for, as the table of kernels sees it."""
    mesh, (batch, length, num_heads, size), num_keys = current_mesh(), q.shape, k.shape[1]
    free = set() if mesh is None else free_axes(mesh)
    rows, heads = (1 if mesh is None else axis_size(mesh, [a for a in axes if a in free]) for axes in (BATCH_AXES, ("model",)))
    asked = features(
        causal=sight.causal, window=sight.window, soft_cap=soft_cap, alibi=sight.alibi, segments=sight.q_segments is not None,
        bias=sight.bias is not None, prefix_mask=sight.prefix_mask is not None, dropout=dropout,
        cache=sight.q_positions is not None or sight.k_positions is not None, dtype=dtype, head_size=size,
        own_keys=length == num_keys,
    )  # fmt: skip
    return Case(platform(), length, num_keys, scores_per_device(batch, num_heads, rows, heads), asked)


def attend_local(
    kernel: str,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sight: Sight,
    slopes: Float[Array, " N"] | None,
    *,
    scale: float,
    soft_cap: float | None,
    dtype: str,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """One device's part by a named kernel, which has the features that `sight` asks for. `slopes` are those of its heads."""
    options: dict[str, Any] = {"causal": sight.causal, "window": sight.window, "scale": scale, "dtype": dtype}
    rows: dict[str, Any] = {"q_segments": sight.q_segments, "k_segments": sight.k_segments, "soft_cap": soft_cap}
    if kernel == "blocked":
        return attend_blocked(q, k, v, bias=sight.bias, slopes=slopes, **rows, **options)
    if kernel == "dense":
        return attend_dense(q, k, v, sight, scale=scale, soft_cap=soft_cap, dtype=dtype, slopes=slopes)
    if slopes is not None:
        q, k = alibi_columns(q, k, slopes, scale)
    if kernel == "cudnn":
        out, lse = attend_cudnn(q, k, v, **options)
    else:
        out, lse = {"splash": attend_splash, "tokamax": attend_tokamax}[kernel](q, k, v, **rows, **options)
    return out, lse if slopes is None else lse - slopes * jnp.arange(q.shape[1], dtype=jnp.float32)[None, :, None]


def on_mesh(
    run: Callable[..., tuple[Array, Array]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sight: Sight,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`run(q, k, v, sight, slopes)` on each device's rows and heads; the partitioner cannot split a kernel's call itself.

    Rows lie on the data axes, heads on `model`. What an axis does not divide is whole on each of its devices; of
    key/value heads that are whole, a device takes those that its query heads read.
    """
    slopes = alibi_slopes(q.shape[2]) if sight.alibi else None
    mesh = current_mesh()
    axes = () if mesh is None else tuple(a for a in AXES if a in free_axes(mesh))
    if mesh is None or not axes:
        return run(q, k, v, sight, slopes)
    rows = tuple(a for a in BATCH_AXES if a in axes)
    rows = rows if q.shape[0] % axis_size(mesh, rows) == 0 else ()
    shards = axis_size(mesh, "model") if "model" in axes else 1
    heads = "model" if shards > 1 and q.shape[2] % shards == 0 else None
    kv_heads = heads if k.shape[2] % shards == 0 else None
    arrays, rebuild = jax.tree.flatten(sight)

    def spec(x: Array) -> P:
        return P(rows) if x.ndim < 4 else P(rows if x.shape[0] > 1 else None, heads if x.shape[1] > 1 else None)  # the bias

    def local(q: Array, k: Array, v: Array, arrays: list[Array], slopes: Array | None) -> tuple[Array, Array]:
        if heads and not kv_heads:
            k, v = (own_kv_heads(a, q.shape[2] * shards, q.shape[2], jax.lax.axis_index("model")) for a in (k, v))
        return run(q, k, v, jax.tree.unflatten(rebuild, arrays), slopes)

    by_kv, by_slope = P(rows, None, kv_heads), None if slopes is None else P(heads)
    in_specs = (P(rows, None, heads), by_kv, by_kv, [spec(x) for x in arrays], by_slope)
    out_specs = (P(rows, None, heads), P(rows, None, heads))
    # check_vma: a library's kernel does not say over which axes its results vary.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)(q, k, v, arrays, slopes)


def own_kv_heads(x: Float[Array, "B S K H"], num_heads: int, own: int, shard: Array) -> Float[Array, "B S _ H"]:
    """Of all key/value heads those that query heads shard · own … shard · own + own − 1 read, so that they pair up again."""
    group = num_heads // x.shape[2]
    if group % own == 0:  # all of them read one head
        return jax.lax.dynamic_slice_in_dim(x, shard * own // group, 1, axis=2)
    return jnp.take(x, (shard * own + jnp.arange(own)) // group, axis=2)


def alibi_columns(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], slopes: Float[Array, " N"], scale: float
) -> tuple[Float[Array, "B T N E"], Float[Array, "B S K E"]]:
    """ALiBi for a kernel that has none: columns of q and k whose product is slope · j.

    Causal scores lose slope · (i − j). What depends on the query alone moves no weight, so slope · j does the same, and the
    log-sum-exp is slope · i too high. bf16 holds 8 bits: j goes in as digits of base 256, the slope as its leading bits and
    the rest, so that the products are exact to 2⁻¹⁶ of the slope.
    """
    index, high = jnp.arange(k.shape[1]), slopes.astype(jnp.bfloat16).astype(jnp.float32)
    digits = jnp.stack([index // 65536 * 65536, index // 256 % 256 * 256, index % 256], axis=-1).astype(jnp.float32)
    parts = jnp.repeat(jnp.stack([high, slopes - high], axis=-1) / scale, 3, axis=-1)  # kernels multiply q by the scale
    digits = jnp.concatenate([digits, digits, jnp.zeros((*digits.shape[:1], 2))], axis=-1)  # 8 columns: a size that cuDNN takes
    parts = jnp.concatenate([parts, jnp.zeros((*parts.shape[:1], 2))], axis=-1)
    q = jnp.concatenate([q, jnp.broadcast_to(parts[None, None], (*q.shape[:3], 8)).astype(jnp.float32)], axis=-1)
    return q, jnp.concatenate([k, jnp.broadcast_to(digits[None, :, None], (*k.shape[:3], 8)).astype(k.dtype)], axis=-1)


# ------------------------------------------------------------------------------------------- cache


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "positions"], meta_fields=["empty"])
@dataclass(frozen=True)
class Cache:
    """Keys and values of the past. One array per entry of the layer pattern, since a window needs fewer slots.

    Heads before slots: each head's keys are one matrix in memory, which a product reads as it lies. XLA:CPU copies any other layout.

    A window of w keeps a ring of w slots: position p lies in slot p mod w.
    """

    keys: tuple[Float[Array, "_ B K _ H"], ...]
    """After the rotary embedding."""
    values: tuple[Float[Array, "_ B K _ H"], ...]
    positions: tuple[Int[Array, "B _"], ...]
    """Position held by each slot; −1 is empty."""
    empty: bool = True
    """Known when tracing: the first call has no past to attend to."""


def write_slots(slots: Float[Array, "B K S H"], new: Float[Array, "B T K H"], index: Int[Array, "B T"]) -> Float[Array, "B K S H"]:
    """`slots` with row b's new entries at `index[b]`; an index beyond the last slot writes nothing."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return slots.at[rows, :, index].set(new.astype(slots.dtype), mode="drop")


def slot_index(positions: Int[Array, "B T"], valid: Bool[Array, "B T"], num_slots: int) -> Int[Array, "B T"]:
    """Slot of each new token; `num_slots`, which writes nothing, for padding and for what a later token of this call overwrites."""
    last = jnp.where(valid, positions, -1).max(1, keepdims=True)
    keep = valid & (positions > last - num_slots)
    return jnp.where(keep, positions % num_slots, num_slots)
