"""What the loop costs beside the device step, and how long a start takes: on the quickstart, in processes of their own.

    python -m tools.bench.overhead

1. A start with a cold compilation cache and one with a warm one: seconds from the command to the end of the first step.
2. The quickstart's steady state in the real loop, against the same compiled step called in a row on one batch, in one
   process, alternating. share = 1 − (bare seconds per step) / (loop's seconds per step).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def first_step_seconds(cache: str, run_dir: str) -> float:
    """Seconds from the command until the first step's line is printed."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "jaxllm", "train", str(ROOT / "configs" / "quickstart.py"), "--num_steps", "1", "--run_dir", run_dir]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAXLLM_CACHE": cache}, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            seconds = time.perf_counter() - start
            process.communicate()
            return seconds
    raise RuntimeError("the run ended before its first step")


def steady_state(steps: int = 20, rounds: int = 3) -> tuple[float, float]:
    """(seconds per step in the loop, seconds of the bare step), medians over alternating rounds."""
    from jaxllm.cli import setup_jax

    setup_jax()
    import jax

    from configs.quickstart import config
    from jaxllm import hosts, loop, metrics, pretrain, rundir, sharding
    from jaxllm.data.batch import to_global

    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run_dir=folder, num_steps=10_000, save_every=10_000)
        experiment = pretrain.experiment(config, precision="float32")
        mesh = sharding.make_mesh(config.mesh)
        in_loop, bare = [], []
        with rundir.claim(config) as run_dir, hosts.Signals() as signals, metrics.Writer(run_dir) as writer, jax.set_mesh(mesh):
            session = loop.Session(experiment, mesh, run_dir, writer, signals, lambda line: None)
            found = session.find_start()
            session.describe("float32", {})
            session.start(*found)
            for round_ in range(rounds + 1):
                session.config = replace(config, num_steps=session.done_steps + steps)
                start = time.perf_counter()
                session._train_until_interrupted()
                jax.block_until_ready(session.state)
                loop_seconds = (time.perf_counter() - start) / steps
                item = next(session.dataset.read(session.position, session.rows))
                batch = to_global(item.batch, mesh, config.data.batch_size)
                start = time.perf_counter()
                for _ in range(steps):
                    session.state, _ = session.step_fn(session.state, session.frozen, batch)
                jax.block_until_ready(session.state)
                bare_seconds = (time.perf_counter() - start) / steps
                if round_:  # the first round compiles
                    in_loop.append(loop_seconds)
                    bare.append(bare_seconds)
        return statistics.median(in_loop), statistics.median(bare)


def main() -> None:
    """Print both."""
    with tempfile.TemporaryDirectory() as folder:
        cold = first_step_seconds(f"{folder}/cache", f"{folder}/cold")
        warm = first_step_seconds(f"{folder}/cache", f"{folder}/warm")
    print(f"first step after {cold:.1f} s with cold caches (tokenizer, corpus and program made), {warm:.1f} s with warm ones", flush=True)
    in_loop, bare = steady_state()
    print(f"{in_loop * 1e3:.0f} ms a step in the loop, {bare * 1e3:.0f} ms bare: {1 - bare / in_loop:.1%} outside the device step")


if __name__ == "__main__":
    main()
