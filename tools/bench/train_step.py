"""Tokens/s and peak memory of the real train step of smollm2-135m on CPU, alternating with a peer.

    python -m tools.bench.train_step --peer .venv-parity/bin/python       # runs tools/bench/hf_train_step.py there, in turn
    python -m tools.bench.train_step --peer … --lora qv                   # LoRA of rank 8: beside PEFT, and beside our own full step
    python -m tools.bench.train_step --precision bfloat16_matmul          # one process of ours, one JSON line

All are whole processes, run in turn; the ratio is taken round by round, because machines drift.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
LORA = {"qv": "layers/attention/[qv]/kernel", "all": "layers/.*/kernel"}


def main() -> None:
    """One process of ours, or pairs with the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of an environment with torch and transformers; without it only we run, once")
    parser.add_argument("--peer_dtype", default="float32", choices=["float32", "bfloat16"], help="the peer's best on this machine")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16_matmul", "bfloat16"])
    parser.add_argument("--remat", default="minimal", choices=["none", "full", "dots", "minimal"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256, help="positions of T whose logits exist at one time")
    parser.add_argument("--unroll", type=int, default=1, help="layers in one iteration of the scan")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--lora", default="none", choices=["none", *LORA], help="adapters of rank 8 on queries and values, or on all linears"
    )
    args = parser.parse_args()
    if args.peer is None:
        print(json.dumps(ours(args)))
        return
    shape = ["--layers", str(args.layers), "--batch", str(args.batch), "--length", str(args.length), "--steps", str(args.steps)]
    own = ["--precision", args.precision, "--remat", args.remat, "--chunk", str(args.chunk), "--unroll", str(args.unroll)]
    mine = [sys.executable, "-m", "tools.bench.train_step", *own, *shape]
    peer = [args.peer, str(HERE / "hf_train_step.py"), "--dtype", args.peer_dtype, *shape]
    sides = {"ours": [*mine, "--lora", args.lora], "the peer's": [*peer, "--lora", args.lora]}
    if args.lora != "none":
        sides["ours without LoRA"] = mine
    rounds = []
    for number in range(args.pairs):
        said = {
            name: json.loads(subprocess.run(c, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for name, c in sides.items()
        }
        rounds.append(said)
        each = (f"{name} {one['tokens_per_second']:.1f} tokens/s, {one['peak_bytes'] / 1e6:,.0f} MB" for name, one in said.items())
        print(f"round {number + 1}: {'; '.join(each)}", flush=True)
    last = []
    for other in list(sides)[1:]:
        speed, memory = (
            statistics.median(said["ours"][what] / said[other][what] for said in rounds) for what in ("tokens_per_second", "peak_bytes")
        )
        last.append(f"{speed:.2f} × the speed and {memory:.2f} × the memory of {other}")
    print(f"median of {args.pairs} rounds, {args.precision}, the peer in {args.peer_dtype}: {'; '.join(last)}")


def ours(args: argparse.Namespace) -> dict[str, float]:
    """Steps of the real train step on random tokens, the first one (compilation) left out."""
    from jaxllm.cli import setup_jax

    setup_jax()
    import jax
    import numpy as np

    from configs.models import smollm2_135m
    from jaxllm import pretrain, sharding
    from jaxllm.config import DataConfig, LoraConfig, LossConfig, OptimConfig, TrainConfig
    from jaxllm.contract import Batch
    from jaxllm.step import frozen_base, program
    from jaxllm.surgery.adapters import TRAIN_ONLY_LORA

    config = TrainConfig(
        model=replace(smollm2_135m, num_layers=args.layers),
        data=DataConfig(sequence_length=args.length, batch_size=args.batch),
        loss=LossConfig(chunk=args.chunk),
        remat=args.remat,
        unroll_layers=args.unroll,
    )
    if args.lora != "none":
        config = replace(config, lora=LoraConfig(((LORA[args.lora], 8, 16.0),)), optim=OptimConfig(freeze=TRAIN_ONLY_LORA))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    experiment = pretrain.experiment(config, precision=args.precision)
    with jax.set_mesh(mesh):
        step, make, _ = program(experiment, mesh)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (args.batch, args.length + 1)).astype(np.int32)
        ones = np.ones((args.batch, args.length), np.int32)
        positions = np.tile(np.arange(args.length, dtype=np.int32), (args.batch, 1))
        rows = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)
        batch = jax.device_put(rows, sharding.batch_sharding(mesh))
        state, frozen, seconds = make(), frozen_base(experiment, mesh), []
        for _ in range(args.steps):
            start = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    return {
        "tokens_per_second": args.batch * args.length / statistics.median(seconds[1:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
