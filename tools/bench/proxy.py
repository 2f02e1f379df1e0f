"""Time of a proxy-tuned decoding step against the sum of its three models' own steps, in turn in one process.

    python -m tools.bench.proxy                     # smollm2-135m's shape and two of 20M, one row
    python -m tools.bench.proxy --batch 8 --layers 30 --small_layers 8

Weights are random. Each round runs every decoder for `--tokens` tokens, one after the other, so that a machine that drifts drifts for all;
the ratio is taken round by round. The last line compares the two small models in one program, one after the other, with both as one
batched call (their weights stacked, `vmap`): whether that would pay here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.models import smollm2_135m
from jaxllm import tree
from jaxllm.cli import setup_jax
from jaxllm.contract import LM, Params
from jaxllm.models.decoding import for_cpu
from jaxllm.models.generate import generator, sampler
from jaxllm.models.proxy import proxy_lm
from jaxllm.models.transformer import decoder


def main() -> None:
    """Print one line for each decoder, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="slots of the caches")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--small_layers", type=int, default=8)
    parser.add_argument("--precision", choices=["float32", "bfloat16", "bfloat16_matmul"], default=None)
    args = parser.parse_args()
    setup_jax()
    on_cpu = jax.default_backend() == "cpu"
    precision: Any = args.precision or ("float32" if on_cpu else "bfloat16")
    large = replace(smollm2_135m, num_layers=args.layers)
    small = replace(smollm2_135m, num_layers=args.small_layers, width=256, num_heads=4, num_kv_heads=2, ff_width=896)
    made = {}
    for seed, (name, config) in enumerate({"base": large, "expert": small, "anti": small}.items()):
        trained = jax.jit(decoder(config).init)(jax.random.key(seed))
        made[name] = for_cpu(config, trained, precision) if on_cpu else (decoder(config, precision=precision), trained)
        print(f"{name}: {tree.count(trained) / 1e6:.1f}M parameters")
    lms, params = {name: lm for name, (lm, _) in made.items()}, {name: own for name, (_, own) in made.items()}
    runs = {name: decoding(lms[name], params[name], args.batch, args.length) for name in made}
    runs["proxy"] = decoding(proxy_lm(lms["base"], lms["expert"], lms["anti"]), params, args.batch, args.length)
    laps = in_turn(runs, args.rounds, args.tokens)
    ratios = [lap["proxy"] / (lap["base"] + lap["expert"] + lap["anti"]) for lap in laps]
    print(f"{jax.devices()[0].device_kind}, {precision}, batch {args.batch}, {args.length} slots")
    for name in runs:
        print(f"{name:7} {statistics.median(lap[name] for lap in laps) * 1e3:8.2f} ms a token")
    print(f"proxy / (base + expert + anti): {statistics.median(ratios):.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    pairs = {
        "two": pair(lms["expert"], params, args.batch, args.length, False),
        "one": pair(lms["expert"], params, args.batch, args.length, True),
    }
    laps = in_turn(pairs, args.rounds, args.tokens)
    print(f"small models stacked / one after the other: {statistics.median(lap['one'] / lap['two'] for lap in laps):.3f}")


def in_turn(runs: dict[str, Callable[[int], None]], rounds: int, tokens: int) -> list[dict[str, float]]:
    """Seconds a token of each, for each round; the first call of each compiles and is left out."""
    for run in runs.values():
        run(2)
    laps = []
    for number in range(rounds):
        lap = {}
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            start = time.perf_counter()
            runs[name](tokens)
            lap[name] = (time.perf_counter() - start) / tokens
        laps.append(lap)
    return laps


def decoding(lm: LM, params: Params, batch: int, length: int) -> Callable[[int], None]:
    """A function that writes that many more tokens, greedily, by the generator's own decode step."""
    engine = generator(lm, sampler(temperature=0))
    keys = np.zeros((batch, 2), np.uint32)
    prompts = np.random.default_rng(0).integers(3, lm.config.vocab_size, (batch, 16)).astype(np.int32)
    new, carry = engine.prefill(params, None, prompts, np.full(batch, 16, np.int32), keys, length, 1, None)
    state: dict[str, Any] = {"tokens": new.tokens, "carry": carry}

    def run(num: int) -> None:
        for _ in range(num):
            new, state["carry"] = engine.decode(params, None, state["tokens"], keys, state["carry"])
            state["tokens"] = new.tokens
        state["tokens"].block_until_ready()

    return run


def pair(lm: LM, params: Params, batch: int, length: int, stacked: bool) -> Callable[[int], None]:
    """One step of two models of one shape, logits and all: one after the other, or as one batched call."""
    both = [params["expert"], params["anti"]]

    def step(own: Params, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        out = lm.apply(own, tokens, positions=positions, cache=cache)
        return lm.unembed(own).logits(out.hidden[:, 0]), out.cache

    def run_both(weights: Any, positions: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        tokens = jnp.ones((batch, 1), jnp.int32)
        if stacked:
            logits, caches = jax.vmap(step, (0, None, None, 0))(weights, tokens, positions, caches)
            return logits[0] - logits[1], caches
        (a, one), (b, two) = (step(own, tokens, positions, cache) for own, cache in zip(weights, caches, strict=True))
        return a - b, (one, two)

    join = lambda *leaves: jnp.stack(leaves)
    caches: Any = tuple(replace(lm.init_cache(batch, length), empty=False) for _ in both)
    weights: Any = jax.tree.map(join, *both) if stacked else tuple(both)
    own = jax.tree.map(join, *caches) if stacked else caches
    state: dict[str, Any] = {"caches": jax.tree.map(lambda leaf: leaf + 0, own), "at": 0}  # buffers that may be donated
    compiled = jax.jit(run_both, donate_argnums=2)

    def run(num: int) -> None:
        for _ in range(num):
            difference, state["caches"] = compiled(weights, jnp.full((batch, 1), state["at"], jnp.int32), state["caches"])
            state["at"] += 1
        difference.block_until_ready()

    return run


if __name__ == "__main__":
    main()
