"""Continue prompts: one jitted prefill, one jitted decode step with a donated cache, static shapes.

Letters: B rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import ConfigError
from jaxllm.contract import LM, Params
from jaxllm.sharding import constrain

type Sampler = Callable[[Float[Array, "B V"], Array], Int[Array, " B"]]


def sampler(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampler:
    """A token of each row from its logits; temperature 0 takes the most probable one.

    Each row has a key of its own, made of the seed and its prompt, so that its text does not depend on which rows are
    beside it; equal prompts get equal texts.

    Args:
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability (arXiv:1904.09751 section 3.1).
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: need temperature >= 0, top_k >= 0, 0 < top_p <= 1")

    def sample(logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
        if temperature == 0:
            return jnp.argmax(logits, -1)
        logits = logits / temperature
        if top_k:
            kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if top_p < 1:
            order = jnp.sort(logits, axis=-1)[:, ::-1]
            before = jnp.cumsum(jax.nn.softmax(order, -1), -1) - jax.nn.softmax(order, -1)
            least = jnp.min(jnp.where(before < top_p, order, jnp.inf), -1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.vmap(jax.random.categorical)(keys, logits)

    return sample


@dataclass(frozen=True)
class Generator:
    """Compiled prefill and decode of one LM, to be reused over prompts of like shape."""

    prefill: Callable[..., tuple[Array, Any]]
    decode: Callable[..., tuple[Array, Any]]
    lm: LM


def generator(lm: LM, sample: Sampler) -> Generator:
    """Jit `lm` for generation with `sample`."""

    def next_of(params: Params, hidden: Float[Array, "B D"], keys: Array, step: Array) -> Int[Array, " B"]:
        logits = lm.unembed(params).logits(hidden)
        return constrain(sample(logits, jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)), ".")

    def prefill(params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Any, keys: Array) -> tuple[Array, Any]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        out = lm.apply(params, tokens, positions=positions, segment_ids=(positions < lengths[:, None]).astype(jnp.int32), cache=cache)
        last = jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return next_of(params, last, keys, jnp.int32(0)), out.cache

    def decode(
        params: Params, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: Any, keys: Array, step: Array
    ) -> tuple[Array, Any]:
        out = lm.apply(params, tokens[:, None], positions=positions[:, None], cache=cache)
        return next_of(params, out.hidden[:, 0], keys, step), out.cache

    return Generator(jax.jit(prefill), jax.jit(decode, donate_argnums=(3,)), lm)


def stream(
    generate: Generator, params: Params, prompts: Sequence[Sequence[int]], *, num_tokens: int, seed: int = 0, max_length: int | None = None
) -> Iterator[np.ndarray]:
    """The next token of every prompt, `num_tokens` times, as arrays [B].

    Raises:
      ConfigError: an empty prompt, or one that with its continuation is longer than the context (says by how much).
    """
    if not prompts:
        return
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    config = generate.lm.config
    needed = int(lengths.max()) + num_tokens
    limit = max_length or needed
    if lengths.min() < 1:
        raise ConfigError(f"prompt {int(lengths.argmin())} is empty; give at least one token, e.g. the end-of-text token")
    context = min(limit, config.max_length) if config.position == "learned" else limit
    if needed > context:
        raise ConfigError(
            f"a prompt of {int(lengths.max())} tokens and {num_tokens} new ones are {needed - context} too many for a context of {context}"
        )
    tokens = np.zeros((len(prompts), int(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    root = jax.random.key_data(jax.random.key(seed))  # a row's randomness is a function of the seed and its own prompt
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        root, np.array([zlib.crc32(np.asarray(prompt, np.int32).tobytes()) for prompt in prompts], np.uint32)
    )
    new, cache = generate.prefill(params, tokens, lengths, generate.lm.init_cache(len(prompts), limit), keys)
    for step in range(num_tokens):
        yield np.asarray(new)
        if step + 1 < num_tokens:
            new, cache = generate.decode(params, new, lengths + step, cache, keys, jnp.int32(step + 1))


def complete(
    generate: Generator, params: Params, prompts: Sequence[Sequence[int]], *, num_tokens: int, stop_ids: Sequence[int] = (), seed: int = 0
) -> list[list[int]]:
    """The continuation of each prompt, without the stop token that ended it."""
    done: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for new in stream(generate, params, prompts, num_tokens=num_tokens, seed=seed):
        for row in list(open_rows):
            if int(new[row]) in stop_ids:
                open_rows.remove(row)
            else:
                done[row].append(int(new[row]))
        if not open_rows:
            break
    return done
