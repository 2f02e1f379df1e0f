"""The layers one after the other: a scan over periods of the layer pattern, each layer under `jax.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import LayerKind, ModelConfig
from jaxllm.contract import Params
from jaxllm.models.attention import Cache, slot_index
from jaxllm.models.block import Block, Context
from jaxllm.models.layers import rope_tables

type Reparam = Callable[[Params], Params]
"""One layer's params -> those it runs with."""

REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names("attention_heads")
    ),
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "offload_inputs": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input"], offload_src="device", offload_dst="pinned_host"
    ),
}
"""name -> what the backward pass finds in memory. `TrainConfig.remat` describes each; `flops.REMAT` says the same in parts."""


def run_layers(
    config: ModelConfig,
    block: Block,
    remat: str,
    unroll: int,
    reparam: Reparam | None,
    layers: Params | list[Params],
    x: Float[Array, "B T D"],
    ctx: Context,
    positions: Int[Array, "B T"],
    prefix: tuple[Array, Array] | None,
    cache: Cache | None,
) -> tuple[Float[Array, "B T D"], dict[str, Array], Cache | None]:
    """Scan over periods of the layer pattern, so that each layer's window is static; what remains runs after."""
    pattern, depth = config.layer_pattern, config.num_layers
    period = len(pattern)
    whole = 0 if depth == period and remat == "none" else depth // period  # one period is no loop
    contexts, after = zip(*(_kind_context(config, kind, j, ctx, positions, cache) for j, kind in enumerate(pattern)), strict=True)

    def layer(j: int, x: Array, own: dict[str, Any]) -> tuple[Array, dict[str, Array], Any]:
        here = replace(contexts[j], prefix=own.get("prefix"), past=own.get("past"), key=own.get("key"))
        params = own["params"] if reparam is None else reparam(own["params"])
        return cast(tuple[Array, dict[str, Array], Any], block.apply({"params": params}, x, here))

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[remat], static_argnums=(0,), prevent_cse=False)

    # What each layer owns, as one list per period position of arrays stacked over that position's layers.
    own: dict[str, Any] = {"params": layers}
    if prefix is not None:
        own["prefix"] = prefix
    if ctx.key is not None:
        own["key"] = jax.random.split(ctx.key, depth)

    def at(j: int, first: int, last: int) -> dict[str, Any]:
        """Layers j, j + period, … of the periods [first, last)."""
        which = slice(first * period + j, (last - 1) * period + j + 1, period)
        part = {name: _slice(stack, which) for name, stack in own.items()}
        if cache is not None:
            part["past"] = jax.tree.map(lambda a: a[first:last], (cache.keys[j], cache.values[j]))
        return part

    def run_period(x: Array, parts: Sequence[dict[str, Any]]) -> tuple[Array, list[tuple[dict[str, Array], Any]]]:
        outs = []
        for j, part in enumerate(parts):
            x, tapped, kept = layer(j, x, part)
            outs.append((tapped, kept))
        return x, outs

    stacked: list[list[Any]] = [[] for _ in pattern]
    if whole:
        x, outs = jax.lax.scan(run_period, x, [at(j, 0, whole) for j in range(period)], unroll=min(unroll, whole))
        for j, out in enumerate(outs):
            stacked[j].append(out)
    if depth > whole * period:
        rest = [jax.tree.map(lambda a: a[0], at(j, whole, whole + 1)) for j in range(depth - whole * period)]
        x, outs = run_period(x, rest)
        for j, out in enumerate(outs):
            stacked[j].append(jax.tree.map(lambda a: a[None], out))

    by_kind = [jax.tree.map(lambda *a: jnp.concatenate(a) if len(a) > 1 else a[0], *s) if s else ({}, None) for s in stacked]
    tapped = {name: _interleave([taps[name] for taps, _ in by_kind if name in taps], depth) for name in ctx.taps}
    if cache is not None:
        kept = [by_kind[j][1] or (cache.keys[j], cache.values[j]) for j in range(period)]
        cache = Cache(tuple(k for k, _ in kept), tuple(v for _, v in kept), tuple(after), empty=False)
    return x, tapped, cache


def _slice(stack: Any, which: slice) -> Any:
    """Some of the layers, stacked: out of a stack, or of a list in which every layer has arrays of its own."""
    if isinstance(stack, list):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack[which])
    return jax.tree.map(lambda leaf: leaf[which], stack)


def _interleave(parts: Sequence[Array], depth: int) -> Array:
    """Arrays stacked per period position back into layer order."""
    if len(parts) == 1:
        return parts[0]
    order = sorted((index * len(parts) + j, j, index) for j, part in enumerate(parts) for index in range(part.shape[0]))
    assert len(order) == depth
    return jnp.stack([parts[j][index] for _, j, index in order])


def _kind_context(
    config: ModelConfig, kind: LayerKind, j: int, ctx: Context, positions: Int[Array, "B T"], cache: Cache | None
) -> tuple[Context, Array | None]:
    """The context of layers of one kind, and the positions in its cache slots after this call."""
    rope = rope_tables(kind.rope or config.rope, config.head_size, positions) if config.position == "rope" else None
    sight = replace(ctx.sight, window=kind.window)
    ctx = replace(ctx, sight=sight, rope=rope)
    if cache is None:
        return ctx, None
    before = cache.positions[j]
    valid = jnp.ones(positions.shape, bool) if sight.q_segments is None else sight.q_segments > 0
    slots = slot_index(positions, valid, before.shape[1])
    rows = jnp.arange(before.shape[0])[:, None]
    after = before.at[rows, slots].set(positions, mode="drop")
    sight = replace(sight, q_positions=positions)
    return replace(ctx, sight=sight, slots=slots, positions=(before, after), first_call=cache.empty), after
