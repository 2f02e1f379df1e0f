"""The decoder: one block for every family, stacked and scanned, as pure functions over a plain dict.

The project's one legend of dimension letters:

    B batch        T query length   S key length      L layers       D model width
    N query heads  K key/value heads G = N/K          H head size    F feed-forward width
    V vocabulary   R LoRA rank      P prefix length

A block is a linen module; layers are stacked `[L, ...]` by `vmap` over its init and run by
`jax.lax.scan` over periods of the layer pattern, each layer under `jax.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.config import ConfigError, ModelConfig, Precision, nearest
from jaxllm.contract import LM, Dot, Out, Params, Unembedding, dot_in
from jaxllm.models.attention import Cache, Sight
from jaxllm.models.block import SEQUENCE, TAPS, Block, Context
from jaxllm.models.layers import Norm, dropout, kernel_std, look_up
from jaxllm.models.stack import Reparam, run_layers
from jaxllm.sharding import constrain

PRECISIONS = {"float32": ("float32", "float32"), "bfloat16": ("bfloat16", "bfloat16"), "bfloat16_matmul": ("float32", "bfloat16")}
"""name -> (type of activations, type of matmul operands). Params are float32 masters, sums are float32."""


def decoder(
    config: ModelConfig,
    *,
    precision: Precision = "float32",
    remat: Literal["none", "full", "dots", "minimal", "offload", "offload_inputs"] = "none",
    unroll: int = 1,
    shard_sequence: bool = False,
    dot: Dot | None = None,
    reparam: Reparam | None = None,
) -> LM:
    """The LM of `config`.

    Args:
      precision: a key of `PRECISIONS`.
      remat: what the backward pass recomputes; a key of `stack.REMAT`, or 'none'.
      unroll: periods of the layer pattern per iteration of the scan.
      shard_sequence: block boundaries shard T over `model` instead of D.
      dot: replaces the einsum of every projection, the output head included.
      reparam: replaces one layer's params before the layer runs.
    """
    activation, operand = PRECISIONS[precision]
    dims = SEQUENCE if shard_sequence else "B T D"
    einsum = dot or dot_in(operand)
    block = Block(config, einsum, operand, dims)
    stack = partial(run_layers, config, block, remat, unroll, reparam)

    def init(key: Array) -> Params:
        """Float32 params at the logical vocabulary size."""
        embed_key, layers_key, head_key, position_key = jax.random.split(key, 4)
        std = 1.0 if config.init == "fan_in" else config.init_std
        shape = (config.vocab_size, config.width)
        embed: Params = {"tokens": std * jax.random.normal(embed_key, shape)}
        if config.position == "learned":
            embed["positions"] = std * jax.random.normal(position_key, (config.max_length, config.width))
        params: Params = {"embed": embed, "layers": jax.vmap(partial(_init_block, block))(jax.random.split(layers_key, config.num_layers))}
        if config.final_norm:
            params["final_norm"] = _final_norm(config).init(head_key, jnp.zeros((1, config.width)))["params"]
        if not config.tied_embeddings:
            params["unembed"] = {"kernel": kernel_std(config, config.width) * jax.random.normal(head_key, shape)}
        return params

    def apply(
        params: Params,
        inputs: Int[Array, "B T"] | Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        prefix_mask: Bool[Array, "B T"] | None = None,
        bias: Float[Array, "#B #N T S"] | None = None,
        prefix: tuple[Array, Array] | None = None,
        prefix_segments: tuple[Int[Array, "B T"] | None, Int[Array, "#B P"]] | None = None,
        memory: Float[Array, "B S D"] | None = None,
        memory_segment_ids: Int[Array, "B S"] | None = None,
        cache: Cache | None = None,
        key: Array | None = None,
        taps: Sequence[str] = (),
    ) -> Out:
        """Final hidden states of `inputs`: token ids, or embeddings in their place (used as they are).

        Args:
          positions: within each document; default 0, 1, 2, … A cache needs them.
          segment_ids: document of each token, 0 is padding; attention stays within a document.
          prefix_mask: with mask='prefix', the positions that see each other both ways.
          bias: added to the attention scores of every layer; not together with a cache, whose keys are of another length.
          prefix: (keys, values), each [L #B P K H], always visible, without a position.
          prefix_segments: (of the tokens, of the prefix): a token sees the states of its own segment (1 where the first is None).
          memory: what cross-attention reads.
          memory_segment_ids: a query reads the memory of its own segment (1 where it has no segment_ids); 0 is padding.
          cache: from `init_cache` or an earlier call; the rows' segment_ids mark padding only.
          key: for dropout; None turns it off.
          taps: names out of `TAPS`.
        """
        for name in taps:
            if name not in TAPS:
                raise ConfigError(f"no tap '{name}'; taps are {', '.join(TAPS)}{nearest(name, TAPS)}")
        assert bias is None or cache is None, "apply: a bias has the keys of one call, a cache those of all"
        keys = (None, None) if key is None else jax.random.split(key)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
        x = _embed(config, params["embed"], inputs, positions).astype(activation)
        x = dropout(constrain(x, dims), config.embedding_dropout, keys[0])
        sight = Sight(
            causal=config.mask != "bidirectional",
            alibi=config.position == "alibi",
            q_segments=segment_ids,
            k_segments=segment_ids,
            prefix_mask=prefix_mask if config.mask == "prefix" else None,
            bias=bias,
        )
        memory_sight = None
        if memory is not None:
            queries = jnp.ones(inputs.shape[:2], jnp.int32) if segment_ids is None else segment_ids
            memory_sight = Sight(causal=False, q_segments=None if memory_segment_ids is None else queries, k_segments=memory_segment_ids)
        prefix_sight = None
        if prefix_segments is not None:
            text, states = prefix_segments
            text = jnp.ones(inputs.shape[:2], jnp.int32) if text is None else text
            states = jnp.broadcast_to(states, (len(text), states.shape[1]))
            prefix_sight = Sight(causal=False, q_segments=text, k_segments=states)
        ctx = Context(
            sight, memory=None if memory is None else memory.astype(activation), memory_sight=memory_sight, prefix_sight=prefix_sight,
            key=keys[1], taps=tuple(taps),
        )  # fmt: skip
        x, tapped, cache = stack(params["layers"], x, ctx, positions, prefix, cache)
        if config.final_norm:
            x = cast(Array, _final_norm(config).apply({"params": params["final_norm"]}, x))
        return Out(constrain(x, dims), tapped, cache)

    def unembed(params: Params) -> Unembedding:
        """The output head: the embedding table itself where they are tied."""
        leaves = {"kernel": params["embed"]["tokens"]} if config.tied_embeddings else params["unembed"]
        return Unembedding(leaves, config.logit_scale, config.logit_soft_cap, config.vocab_size, einsum)

    def init_cache(batch_size: int, max_length: int) -> Cache:
        """An empty cache for rows of up to `max_length` tokens."""
        pattern = config.layer_pattern
        sizes = [min(kind.window or max_length, max_length) for kind in pattern]
        depth = [len(range(j, config.num_layers, len(pattern))) for j in range(len(pattern))]
        zeros = tuple(
            jnp.zeros((n, batch_size, config.num_kv_heads, s, config.head_size), activation) for n, s in zip(depth, sizes, strict=True)
        )
        return Cache(zeros, zeros, tuple(jnp.full((batch_size, s), -1, jnp.int32) for s in sizes))

    return LM(config, init, apply, unembed, init_cache, config.has_dropout)


def _final_norm(config: ModelConfig) -> Norm:
    return Norm(config, (config.width,), config.norm_bias)


def _embed(config: ModelConfig, embed: Params, inputs: Array, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    x = inputs if jnp.issubdtype(inputs.dtype, jnp.floating) else look_up(embed["tokens"], inputs) * config.embedding_scale
    if config.position == "learned":
        if inputs.shape[1] > config.max_length:
            raise ConfigError(f"a row has {inputs.shape[1]} tokens, and the model has learned positions for {config.max_length}")
        x = x + jnp.take(embed["positions"], positions, axis=0)
    return x


def _init_block(block: Block, key: Array) -> Params:
    cfg = block.config
    x = jnp.zeros((1, 1, cfg.width))
    memory = jnp.zeros((1, 1, cfg.memory_width or cfg.width)) if cfg.cross_attention else None
    ctx = Context(Sight(causal=False), memory=memory, memory_sight=Sight(causal=False))
    return block.init(key, x, ctx)["params"]
