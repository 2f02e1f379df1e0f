"""Time of one decoding step, which depends on a model's shapes and on nothing that it has learned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm import tree
from jaxllm.config import ModelConfig, Precision
from jaxllm.models.decoding import for_cpu
from jaxllm.models.transformer import PRECISIONS, decoder
from jaxllm.surgery import resize


class Step(NamedTuple):
    """One decoding step, and what it reads."""

    run: Callable[[], None]
    weight_bytes: int
    cache_bytes: int


def decoding_step(config: ModelConfig, batch: int, length: int, precision: Precision, *, listed: bool) -> Step:
    """Greedy decoding of one token a row at the last position of a full cache, with random weights.

    Args:
      batch: rows.
      length: slots of the cache.
      listed: layers one by one, the layout that `jaxllm generate` takes on a CPU; else in one stack, as they are trained.
    """
    activation, operand = PRECISIONS[precision]
    trained = jax.jit(decoder(config).init)(jax.random.key(0))
    if listed:
        lm, params = for_cpu(config, trained, precision)
    else:
        cast = lambda path, leaf: leaf.astype(operand) if path.endswith("/kernel") else leaf
        lm, params = decoder(config, precision=precision), tree.map_with_path(cast, trained)
    empty = lm.init_cache(batch, length)
    full = lambda parts: tuple(jnp.full(part.shape, 0.5, part.dtype) for part in parts)
    positions = tuple(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), part.shape) + 0 for part in empty.positions)
    state = {
        "tokens": jnp.zeros((batch,), jnp.int32),
        "cache": replace(empty, keys=full(empty.keys), values=full(empty.values), positions=positions, empty=False),
    }
    last = jnp.full((batch, 1), length - 1, jnp.int32)

    def decode(params: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        out = lm.apply(params, tokens[:, None], positions=last, cache=cache)
        return jnp.argmax(lm.unembed(params).logits(out.hidden[:, 0]), -1).astype(jnp.int32), out.cache

    compiled = jax.jit(decode, donate_argnums=2)

    def run() -> None:
        state["tokens"], state["cache"] = compiled(params, state["tokens"], state["cache"])
        state["tokens"].block_until_ready()

    weights = {name: part for name, part in params.items() if name != "embed"}
    return Step(run, tree.num_bytes(weights), resize.cache_bytes(config, batch, length, jnp.dtype(activation).itemsize))


class Timed(NamedTuple):
    """Medians over rounds."""

    seconds: float
    """Of a step."""
    share: float
    """Of the first model's step in the same round."""


def in_turn(configs: Sequence[ModelConfig], batch: int, length: int, precision: Precision, rounds: int = 9) -> list[Timed]:
    """A step of each model with `batch` rows and `length` slots of cache, as `jaxllm generate` runs it here, one after the other.

    What else a machine does falls on all of them alike, so that shares say more than seconds.
    """
    steps = [decoding_step(config, batch, length, precision, listed=jax.default_backend() == "cpu") for config in configs]
    laps: list[list[float]] = []
    for step in steps:
        step.run()
    for _ in range(rounds):
        laps.append([])
        for step in steps:
            start = time.perf_counter()
            step.run()
            laps[-1].append(time.perf_counter() - start)
    return [
        Timed(statistics.median(lap[i] for lap in laps), statistics.median(lap[i] / lap[0] for lap in laps)) for i in range(len(configs))
    ]
