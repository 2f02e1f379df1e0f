"""One layer: attention and feed-forward with their norms, as linen modules. Letters: see `transformer.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxllm.config import ModelConfig
from jaxllm.contract import Dot
from jaxllm.models.attention import Sight, attend, merge, write_slots
from jaxllm.models.layers import FeedForward, Norm, Projection, dropout, kernel_std, rotate
from jaxllm.sharding import constrain, in_pieces

TAPS = (
    "block_input", "block_output", "attention_norm", "mlp_norm", "q", "k", "v", "attention_heads", "attention_output",
    "mlp_hidden", "mlp_output",
)  # fmt: skip
"""Intermediates that `apply(..., taps=...)` can return, each stacked over layers: [L B T …]."""

SEQUENCE = "B T@model ."
"""Block boundaries in pieces of the row; the usual ones shard D."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sight", "rope", "prefix", "past", "slots", "positions", "memory", "memory_sight", "prefix_sight", "key"],
    meta_fields=["first_call", "taps"],
)
@dataclass(frozen=True)
class Context:
    """What a block needs besides the residual stream. Some of it is one layer's own: prefix, past, key."""

    sight: Sight
    rope: tuple[Array, Array] | None = None
    prefix: tuple[Float[Array, "#B P K H"], Float[Array, "#B P K H"]] | None = None
    past: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]] | None = None
    slots: Int[Array, "B T"] | None = None
    """Where the new keys go in `past`."""
    positions: tuple[Int[Array, "B S"], Int[Array, "B S"]] | None = None
    """Positions in the slots of `past`, before and after this call."""
    memory: Float[Array, "B M E"] | None = None
    memory_sight: Sight | None = None
    prefix_sight: Sight | None = None
    """None: everybody sees all of the prefix."""
    key: Array | None = None
    first_call: bool = True
    taps: tuple[str, ...] = ()


class Attention(nn.Module):
    """Multi-head, grouped or multi-query attention, to itself or to a memory.

    Source: arXiv:1706.03762 section 3.2.2; GQA arXiv:2305.13245; MQA arXiv:1911.02150.
    """

    config: ModelConfig
    dot: Dot
    site: str
    dtype: str
    shard_sequence: bool = False
    """Whether attention to the row itself runs on pieces of it, T on `model`, where T divides."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], ctx: Context, tap: Callable[[str, Array], Array]) -> tuple[Array, Any]:
        """The attention branch [B T D], and the layer's keys and values for the cache (None without one)."""
        cfg, cross = self.config, self.site == "cross_attention"
        source = ctx.memory if cross else x
        assert source is not None, "cross_attention needs apply(..., memory=...)"
        q = self.project("q", x, cfg.num_heads)
        k, v = (self.project(name, source, cfg.num_kv_heads) for name in "kv")
        if cfg.qk_norm != "none":
            q, k = self.normalise("q_norm", q), self.normalise("k_norm", k)
        if ctx.rope is not None and not cross:
            q, k = rotate(q, ctx.rope), rotate(k, ctx.rope)
        pieces = self.shard_sequence and in_pieces(q.shape[1])
        lie, lie_kv = ("B T@model . .",) * 2 if pieces else ("B . N .", "B . K .")
        q, k, v = tap("q", constrain(q, lie)), tap("k", constrain(k, lie_kv)), tap("v", constrain(v, lie_kv))
        kept = None
        if cross:
            assert ctx.memory_sight is not None
            heads, _ = self.attend(q, k, v, ctx.memory_sight, ctx.key)
        else:
            heads, kept = self.attend_self(q, k, v, ctx, pieces)
        heads = tap("attention_heads", constrain(heads, lie))
        shape, std = (cfg.num_heads, cfg.head_size, cfg.width), kernel_std(cfg, cfg.num_heads * cfg.head_size, residual=True)
        bias = (cfg.width,) if cfg.attention_out_bias else None
        return Projection(self.dot, f"{self.site}/o", "BTNH,NHD->BTD", shape, std, bias, name="o")(heads), kept

    def project(self, name: str, x: Array, num_heads: int) -> Float[Array, "B T N H"]:
        """One of the q, k, v projections."""
        shape = (x.shape[-1], num_heads, self.config.head_size)
        bias = shape[1:] if self.config.qkv_bias else None
        std = kernel_std(self.config, x.shape[-1])
        return Projection(self.dot, f"{self.site}/{name}", "BTD,DNH->BTNH", shape, std, bias, name=name)(x)

    def normalise(self, name: str, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """QK-norm over each head, or over all heads at once."""
        shape = x.shape[-1:] if self.config.qk_norm == "head" else x.shape[-2:]
        return Norm(self.config, shape, name=name)(x)

    def attend(self, q: Array, k: Array, v: Array, sight: Sight, key: Array | None, pieces: bool = False) -> tuple[Array, Array]:
        """(output, log-sum-exp) over the keys that `sight` shows; `pieces`: T and S lie on `model`."""
        cfg = self.config
        return attend(
            q, k, v, sight,
            scale=cfg.head_size**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
            soft_cap=cfg.attention_soft_cap, dropout_rate=cfg.attention_dropout, key=key, dtype=self.dtype, shard_sequence=pieces,
        )  # fmt: skip

    def attend_self(self, q: Array, k: Array, v: Array, ctx: Context, pieces: bool) -> tuple[Array, Any]:
        """Attention to the row itself, to the past in the cache, and to a prefix, merged by log-sum-exp."""
        kept: tuple[Array, ...] | None = None
        part: tuple[Array, Array] | None = None
        if ctx.past is not None:
            assert ctx.slots is not None and ctx.positions is not None
            before, after = ctx.positions
            kept = tuple(write_slots(old, new, ctx.slots) for old, new in zip(ctx.past, (k, v), strict=True))
            kept = jax.lax.optimization_barrier(kept)  # else XLA:CPU writes again inside what reads, and copies the cache to do both
            past_sight = replace(ctx.sight, q_segments=None, k_segments=None, prefix_mask=None)
            if q.shape[1] == 1:  # one token: its own key is already in the slots, and a ring holds exactly its window
                part = self.attend(q, *_slots_first(kept), replace(past_sight, k_positions=after), ctx.key)
            elif not ctx.first_call:
                part = self.attend(q, *_slots_first(ctx.past), replace(past_sight, k_positions=before), ctx.key)
        if ctx.past is None or q.shape[1] > 1:
            own = self.attend(q, k, v, replace(ctx.sight, q_positions=None), ctx.key, pieces)
            part = own if part is None else merge(part, own)
        assert part is not None
        if ctx.prefix is not None:
            pk, pv = (jnp.broadcast_to(a, (q.shape[0], *a.shape[1:])).astype(q.dtype) for a in ctx.prefix)
            part = merge(part, self.attend(q, pk, pv, ctx.prefix_sight or Sight(causal=False), ctx.key))
        return part[0], kept


def _slots_first(cached: Sequence[Float[Array, "B K S H"]]) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """As attention takes them; the product that reads them takes the axes as they lie."""
    keys, values = (jnp.swapaxes(part, 1, 2) for part in cached)
    return keys, values


class Block(nn.Module):
    """One layer: attention and feed-forward branches with their norms, serial or parallel."""

    config: ModelConfig
    dot: Dot
    dtype: str
    dims: str = "B T D"
    """How the residual stream lies on the mesh at block boundaries."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Float[Array, "B T D"], dict[str, Array], Any]:
        """(residual stream, tapped intermediates, keys and values for the cache)."""
        cfg, tapped = self.config, {}

        def tap(name: str, value: Array) -> Array:
            if name in ctx.taps:
                tapped[name] = value
            return value

        keys = (None,) * 5 if ctx.key is None else jax.random.split(ctx.key, 5)
        attention = Attention(cfg, self.dot, "attention", self.dtype, self.dims == SEQUENCE, name="attention")
        feed_forward = FeedForward(cfg, self.dot, name="mlp")
        x = tap("block_input", checkpoint_name(constrain(x, self.dims), "block_input"))
        u = tap("attention_norm", self.before("attention", x))
        branch, kept = attention(u, replace(ctx, key=keys[0]), tap)
        branch = tap("attention_output", dropout(branch, cfg.residual_dropout, keys[1]))
        if cfg.block == "parallel":
            u = u if cfg.parallel_norms == 1 else self.before("mlp", x)
            second = tap("mlp_output", dropout(feed_forward(tap("mlp_norm", u), tap), cfg.residual_dropout, keys[2]))
            if cfg.norm_placement == "after_residual":
                x = self.norm("attention_post_norm")(x + branch + second)
            else:
                x = x + self.after("attention", branch) + self.after("mlp", second)
        else:
            x = self.add("attention", x, branch)
            if cfg.cross_attention:
                cross = Attention(cfg, self.dot, "cross_attention", self.dtype, name="cross_attention")
                branch, _ = cross(self.before("cross_attention", x), replace(ctx, key=keys[3]), lambda _, value: value)
                x = self.add("cross_attention", x, dropout(branch, cfg.residual_dropout, keys[4]))
            branch = feed_forward(tap("mlp_norm", self.before("mlp", x)), tap)
            x = self.add("mlp", x, tap("mlp_output", dropout(branch, cfg.residual_dropout, keys[2])))
        return tap("block_output", constrain(x, self.dims)), tapped, kept

    def norm(self, name: str) -> Norm:
        """A norm over the width."""
        return Norm(self.config, (self.config.width,), self.config.norm_bias, name=name)

    def before(self, branch: str, x: Array) -> Array:
        """The branch's input norm, where the placement has one; gathered over `model`, but for attention to pieces of the row."""
        if self.config.norm_placement in ("before", "both"):
            x = self.norm(f"{branch}_norm")(x)
        pieces = branch == "attention" and self.config.block == "serial" and self.dims == SEQUENCE and in_pieces(x.shape[1])
        return constrain(x, SEQUENCE if pieces else "B . .")

    def after(self, branch: str, y: Array) -> Array:
        """The branch's output norm, where the placement has one."""
        return self.norm(f"{branch}_post_norm")(y) if self.config.norm_placement in ("after", "both") else y

    def add(self, branch: str, x: Array, y: Array) -> Array:
        """The branch's output into the residual stream; GPT-1 normalises their sum."""
        if self.config.norm_placement == "after_residual":
            return self.norm(f"{branch}_post_norm")(constrain(x + y, self.dims))
        return constrain(x + self.after(branch, y), self.dims)
