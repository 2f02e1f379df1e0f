"""Prefix-tuning: key/value states that every layer sees beside the text's own, as leaves of the params and an argument of the model.

    z = [prefix; x; y],   (k, v) of prefix position i in layer l = P[i, l],   P = MLP(P') while training

    prefix/{keys, values} [L P K H]                                             the states, or what makes them:
    prefix/tokens [P D]   prefix/{in, out}/{kernel, bias}                       MLP: tanh(tokens·in)·out, out [M 2·L·K·H]
    prefix/embedding [P D]                                                      embedding-only: the model itself makes them

A prefix has no cache to hide in: remat, windows, packing and cached decoding see it as one more argument. Its keys are as they lie in
a cache, after the rotary embedding. With `shift_positions` the text starts at position P, as where a prefix came first.

A batch in which every row has a prefix of its own: `stack`, then `select`; leaves [A L P K H], `prefix/lengths` [A], `prefix/rows` [B].

Source: arXiv:2101.00190 section 4; the merge by log-sum-exp is the identity of arXiv:2110.04366, section 3.
Letters: L layers, P prefix length, K key/value heads, H head size, D width, M the MLP's width, B rows, T tokens, A prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm import tree
from jaxllm.config import ConfigError, ModelConfig, PrefixConfig
from jaxllm.contract import LM, Params, dot_in

LEAVES = r"prefix/.*"
"""What a prefix adds to the params."""
TRAIN_ONLY_PREFIX = ((LEAVES, False), (r".*", True))
"""`optim.freeze`: the model stands still."""

type States = tuple[Float[Array, "L B P K H"], Float[Array, "L B P K H"]]


def with_prefix(lm: LM, config: PrefixConfig) -> LM:
    """`lm` that sees the prefix in its params.

    Raises:
      ConfigError: a prefix that leaves no room within the learned positions.
    """
    model = lm.config
    _check_room(model, config, 1)

    def init(key: Array) -> Params:
        key, own = jax.random.split(key)
        return tree.merge(lm.init(key), {"prefix": init_leaves(model, config, own)})

    def apply(params: Params, inputs: Array, *, positions: Int[Array, "B T"] | None = None, **options: Any) -> Any:
        own, rest = params["prefix"], {name: part for name, part in params.items() if name != "prefix"}
        keys, values, lengths = _states(lm, rest, own, config)
        num_states = keys.shape[2]
        _check_room(model, config, inputs.shape[1])
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
        queries = None
        if config.place == "infix":
            queries = _after(inputs, positions, config.separator).astype(jnp.int32)
        visible = jnp.ones((1, num_states), jnp.int32) if lengths is None else (jnp.arange(num_states) < lengths[:, None]).astype(jnp.int32)
        segments = None if queries is None and lengths is None else (queries, visible)
        if config.shift_positions:
            positions = positions + (num_states if lengths is None else lengths[:, None])
        return lm.apply(rest, inputs, positions=positions, prefix=(keys, values), prefix_segments=segments, **options)

    def unembed(params: Params) -> Any:
        return lm.unembed({name: part for name, part in params.items() if name != "prefix"})

    return lm._replace(init=init, apply=apply, unembed=unembed)


def init_leaves(model: ModelConfig, config: PrefixConfig, key: Array) -> Params:
    """Random leaves under `prefix/`: normal, of size 1 where an MLP or the model follows, else 0.02."""
    tokens, first, second = jax.random.split(key, 3)
    shape = (model.num_layers, config.length, model.num_kv_heads, model.head_size)
    if config.place == "embedding":
        return {"embedding": model.init_std * jax.random.normal(tokens, (config.length, model.width))}
    if not config.hidden:
        return {"keys": 0.02 * jax.random.normal(first, shape), "values": 0.02 * jax.random.normal(second, shape)}
    width, out = model.width, 2 * model.num_layers * model.num_kv_heads * model.head_size
    layer = lambda key, m, n: {"kernel": jax.random.normal(key, (m, n)) / m**0.5, "bias": jnp.zeros(n)}
    return {
        "tokens": jax.random.normal(tokens, (config.length, width)),
        "in": layer(first, width, config.hidden),
        "out": layer(second, config.hidden, out),
    }


def states_of(lm: LM, params: Params, inputs: Int[Array, "B P"] | Float[Array, "B P D"], first_position: int = 0) -> States:
    """Keys and values that `inputs` (ids, or embeddings) leave in every layer, as they would lie in a cache: each [L B P K H]."""
    positions = jnp.broadcast_to(first_position + jnp.arange(inputs.shape[1]), inputs.shape[:2])
    taps = lm.apply(params, inputs, positions=positions, taps=("k", "v")).taps
    return taps["k"], taps["v"]


def from_text(lm: LM, params: Params, config: PrefixConfig, ids: Sequence[int]) -> Params:
    """Leaves under `prefix/` that start as the activations of a text, repeated or cut to P tokens.

    Args:
      lm, params: the model without a prefix.

    Raises:
      ConfigError: an empty text; an MLP, which cannot be told what to give.
    """
    if not ids:
        raise ConfigError(f"prefix.init_text '{config.init_text}' has no tokens; give some words, or leave it empty for a random start")
    if config.hidden:
        raise ConfigError("prefix.init_text sets the states themselves, and prefix.hidden puts an MLP before them; use one of the two")
    tokens = jnp.asarray([ids[i % len(ids)] for i in range(config.length)], jnp.int32)[None]
    if config.place == "embedding":
        return {"embedding": jnp.take(params["embed"]["tokens"], tokens[0], axis=0).astype(jnp.float32) * lm.config.embedding_scale}
    keys, values = states_of(lm, params, tokens, 0 if config.shift_positions else -config.length)
    return {"keys": keys[:, 0].astype(jnp.float32), "values": values[:, 0].astype(jnp.float32)}


def materialise(params: Params, lm: LM, config: PrefixConfig) -> tuple[Params, PrefixConfig]:
    """(params whose prefix is nothing but its states, their config): what is kept after training.

    Args:
      lm: the model without a prefix.
    """
    rest = {name: part for name, part in params.items() if name != "prefix"}
    keys, values, _ = _states(lm, rest, params["prefix"], config)
    return {**rest, "prefix": {"keys": keys[:, 0], "values": values[:, 0]}}, materialised(config)


def materialised(config: PrefixConfig) -> PrefixConfig:
    """The config of a prefix that is nothing but its states."""
    return replace(config, hidden=0, place="before" if config.place == "embedding" else config.place, init_text="")


def stack(prefixes: Sequence[Params]) -> Params:
    """Several materialised prefixes as leaves for `select`: number i is prefixes[i], the last one is empty. Lengths may differ.

    Args:
      prefixes: {'keys', 'values'} of each, [L P K H].

    Raises:
      ConfigError: prefixes of models of unlike shapes, or one that is not materialised.
    """
    for i, own in enumerate(prefixes):
        if set(own) != {"keys", "values"}:
            raise ConfigError(f"prefix {i} has {', '.join(sorted(own))}; prefix.materialise makes keys and values of it")
        shape, first = own["keys"].shape, prefixes[0]["keys"].shape
        if (shape[0], *shape[2:]) != (first[0], *first[2:]):
            raise ConfigError(f"prefix {i} has states {shape} (layers, length, heads, head size), prefix 0 has {first}: of another model")
    longest = max(own["keys"].shape[1] for own in prefixes)

    def padded(name: str) -> Array:
        rows = [jnp.pad(own[name], ((0, 0), (0, longest - own[name].shape[1]), (0, 0), (0, 0))) for own in prefixes]
        return jnp.stack([*rows, jnp.zeros_like(rows[0])])

    lengths = jnp.asarray([*(own["keys"].shape[1] for own in prefixes), 0], jnp.int32)
    return {"keys": padded("keys"), "values": padded("values"), "lengths": lengths}


def select(params: Params, rows: Int[Array, " B"]) -> Params:
    """`params` with the prefixes of `stack`, such that row i of a batch sees prefix rows[i]; −1 sees none."""
    return {**params, "prefix": {**params["prefix"], "rows": jnp.asarray(rows, jnp.int32)}}


def _states(lm: LM, rest: Params, own: Params, config: PrefixConfig) -> tuple[Array, Array, Int[Array, " B"] | None]:
    """Keys, values [L B|1 P K H], and each row's length where they differ."""
    if "rows" in own:
        keys, values = (jnp.moveaxis(own[name][own["rows"]], 0, 1) for name in ("keys", "values"))
        return keys, values, own["lengths"][own["rows"]]
    if "keys" in own:
        return own["keys"][:, None], own["values"][:, None], None
    if "embedding" in own:
        first = 0 if config.shift_positions else -config.length
        return *states_of(lm, rest, own["embedding"][None], first), None
    dot, model = dot_in("float32"), lm.config
    hidden = jnp.tanh(dot("prefix/in", "PD,DM->PM", own["tokens"], own["in"]) + own["in"]["bias"])
    flat = dot("prefix/out", "PM,ME->PE", hidden, own["out"]) + own["out"]["bias"]
    states = flat.reshape(len(flat), model.num_layers, 2, model.num_kv_heads, model.head_size).transpose(2, 1, 0, 3, 4)  # [2 L P K H]
    return states[0][:, None], states[1][:, None], None


def _after(inputs: Array, positions: Int[Array, "B T"], separator: int | None) -> Bool[Array, "B T"]:
    """Whether the last separator at or before a token is in its own document. A call of one token is a step of decoding, after it."""
    if inputs.shape[1] == 1:
        return jnp.ones(inputs.shape[:2], bool)
    index = jnp.arange(inputs.shape[1])
    last = jax.lax.cummax(jnp.where(inputs == separator, index, -1), axis=1)
    return last >= index - positions


def _check_room(model: ModelConfig, config: PrefixConfig, num_tokens: int) -> None:
    if config.length >= model.max_length:
        raise ConfigError(f"a prefix of {config.length} leaves no room in the model's context of {model.max_length} tokens; shorten it")
    if model.position == "learned" and config.shift_positions and config.length + num_tokens > model.max_length:
        raise ConfigError(
            f"a prefix of {config.length} and {num_tokens} tokens do not fit in the model's {model.max_length} learned positions; "
            "shorten the prefix or the rows, or set prefix.shift_positions to False"
        )
