"""Time of one decoding step for several numbers of key/value heads, against the bytes that it must read.

    python -m tools.bench.decode_bandwidth                              # 16, 8, 4, 2, 1 key/value heads; cache larger than weights
    python -m tools.bench.decode_bandwidth --kv_heads 8 1 --batch 4 --length 4096 --precision bfloat16

The bound is (weight bytes + cache bytes) / bandwidth, where the bandwidth is that of a timed sum over an array larger than every
cache of the processor, in the same process, in turn with the steps: machines drift. Weights are random, every slot of the cache is
full, and the embedding table is not counted, as a step looks up one row of it.

Letters: B batch, S slots of the cache, L layers, N query heads, K key/value heads, H head size, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxllm.cli import setup_jax
from jaxllm.config import ModelConfig
from jaxllm.generate.timing import Step, decoding_step
from jaxllm.surgery import resize


def main() -> None:
    """Print a line for each number of heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv_heads", type=int, nargs="+", default=[16, 8, 4, 2, 1])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="slots of the cache, all of them full")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--stacked", action="store_true", help="on CPU: layers in one stack, as they are trained")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the array whose reading is timed")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    setup_jax()
    on_cpu = jax.default_backend() == "cpu"
    precision = args.precision or ("float32" if on_cpu else "bfloat16")
    config = ModelConfig(
        num_layers=args.layers, width=args.width, num_heads=args.heads, num_kv_heads=args.heads, head_size=args.head_size,
        ff_width=3 * args.width, vocab_size=args.vocabulary, max_length=args.length, tied_embeddings=False,
    )  # fmt: skip
    read = reader(args.gib)
    print(f"{jax.devices()[0].device_kind}, {precision}, batch {args.batch}, {args.length} tokens in the cache, {args.layers} layers")
    print(f"{'heads':>5} {'cache MB':>9} {'weights MB':>10} {'GB/s':>6} {'bound ms':>9} {'step ms':>8} {'step / bound':>12}")
    for number in args.kv_heads:
        step = decoding_step(replace(config, num_kv_heads=number), args.batch, args.length, precision, listed=on_cpu and not args.stacked)
        print(line(number, step, read, args.rounds), flush=True)


def line(number: int, step: Step, read: Callable[[], float], rounds: int) -> str:
    """Steps and reads of the large array in turn; medians of both, and of their ratio."""
    bandwidths, laps = [], []
    step.run()
    for _ in range(rounds):
        bandwidths.append(read())
        start = time.perf_counter()
        step.run()
        laps.append(time.perf_counter() - start)
    bounds = [resize.decode_seconds(step.weight_bytes, step.cache_bytes, bandwidth) for bandwidth in bandwidths]
    ratio = statistics.median(lap / bound for lap, bound in zip(laps, bounds, strict=True))
    bandwidth, bound, lap = (statistics.median(values) for values in (bandwidths, bounds, laps))
    return (
        f"{number:5} {step.cache_bytes / 1e6:9.1f} {step.weight_bytes / 1e6:10.1f} {bandwidth / 1e9:6.1f} "
        f"{bound * 1e3:9.2f} {lap * 1e3:8.2f} {ratio:12.2f}"
    )


def reader(gib: float) -> Callable[[], float]:
    """A function that sums `gib` GiB of float32 once, and returns the bytes/s of the faster of two ways to do it."""
    rows = max(64, int(gib * 2**30 / 4) // 4096)
    x = jax.block_until_ready(jnp.full((rows, 4096), 0.5, jnp.float32))
    ones = jnp.ones((4096,), jnp.float32)
    ways = [jax.jit(lambda x: x.sum()), jax.jit(lambda x: (x @ ones).sum())]
    for way in ways:
        way(x).block_until_ready()

    def read() -> float:
        laps = []
        for way in ways:
            start = time.perf_counter()
            way(x).block_until_ready()
            laps.append(time.perf_counter() - start)
        return float(x.nbytes / min(laps))

    return read


if __name__ == "__main__":
    main()
