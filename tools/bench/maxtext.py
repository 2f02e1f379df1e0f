"""Our train step against MaxText's, compiled for the same TPU slice: memory per chip, executed work, the largest batch that fits.

    python -m tools.bench.maxtext --peer PYTHON                     # both cases at their batch; PYTHON's environment has maxtext[tpu]
    python -m tools.bench.maxtext --peer PYTHON --largest           # and the largest batch per chip of llama2-7b on v5e-256

Both are compiled by the libtpu of their own environment (the versions are printed), in bfloat16 with float32 weights, AdamW, full
remat and document masks, and weights sharded over all chips. Work is counted on both jaxprs by `jaxllm.plan.work`. Bytes are those of
XLA's buffer assignment, at which both compilations stop; a batch fits if they are within what libtpu gives a program of a v5e,
15.75 GiB. Half a minute each on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from configs import models
from jaxllm.config import ModelConfig
from jaxllm.plan import command, compiled
from jaxllm.plan.child import OutOfMemory, Request, compile_step
from jaxllm.plan.collectives import Collective, collectives
from jaxllm.plan.topology import parse
from jaxllm.plan.work import Work

HERE = Path(__file__).parent
ROOM = int(15.75 * 2**30)
"""libtpu's own limit on a v5e: "Used 18.20G of 15.75G hbm"."""


class Case(NamedTuple):
    """A model on a slice."""

    name: str
    """As MaxText calls it."""
    model: ModelConfig
    topology: str
    batch: int
    """Rows per chip."""
    length: int


CASES = (
    Case("llama2-7b", models.llama2_7b, "v5e-256", 4, 2048),
    Case("llama3.1-8b", models.llama3_1_8b, "v5p-128", 2, 8192),
)


class Step(NamedTuple):
    """One compiled step."""

    work: Work
    temp_bytes: int
    argument_bytes: int
    """Of one chip, both."""
    sent_bytes: float
    """That one chip sends in all collectives."""
    versions: str

    @property
    def total_bytes(self) -> int:
        """Results take the place of arguments."""
        return self.temp_bytes + self.argument_bytes


def ours(case: Case, batch: int) -> Step | None:
    """Our step, or None where it does not fit."""
    machine = parse(case.topology)
    config = command.for_model(case.name, case.model, machine.num_chips)
    config = replace(config, data=replace(config.data, batch_size=batch * machine.num_chips, sequence_length=case.length))
    try:
        plan = compile_step(Request("jaxllm.pretrain:experiment", config, "bfloat16", machine, generate_code=False))
    except OutOfMemory:
        return None
    return Step(plan.work, plan.memory.temp_bytes, plan.memory.argument_bytes, sent(plan.collectives), named(plan.versions))


def theirs(python: str, case: Case, batch: int) -> Step | None:
    """MaxText's step in its own environment, or None where it does not fit.

    Raises:
      RuntimeError: it does not run; the last line that it printed.
    """
    with tempfile.TemporaryDirectory(prefix="maxtext-") as folder:
        words = ["--model", case.name, "--topology", case.topology, "--batch", batch, "--length", case.length, "--dump", folder]
        done = subprocess.run([python, str(HERE / "maxtext_step.py"), *map(str, words)], capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            raise RuntimeError(f"{python} did not run MaxText: {(done.stderr.strip().splitlines() or ['nothing printed'])[-1]}")
        found = json.loads(lines[-1])
        if "RESOURCE_EXHAUSTED" in found.get("error", ""):
            return None
        if "error" in found:
            raise RuntimeError(f"MaxText's step does not compile: {found['error']}")
        read = lambda kind: compiled.dumped(Path(folder), kind) or ""
        assigned = compiled.assigned(compiled.allocations(read("after_optimizations-buffer-assignment.txt")))
        exchanged = collectives(read(".after_optimizations.txt"), {"data": parse(case.topology).num_chips})[0]
    return Step(Work(**found["work"]), assigned.temp_bytes, assigned.argument_bytes, sent(exchanged), named(found["versions"]))


def sent(found: Sequence[Collective]) -> float:
    """Bytes that one chip sends."""
    return sum(collective.total_sent_bytes for collective in found)


def named(versions: Mapping[str, str]) -> str:
    """Packages with their versions."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def largest(total: Callable[[int], int | None], room: int, first: int) -> int:
    """The largest batch that fits, in few compilations: memory grows almost linearly with the batch.

    Args:
      total: batch -> bytes of one chip, or None where it does not fit.
      room: bytes of a chip.
      first: where to begin; about half of what fits.

    Returns 0 where nothing fits.

    >>> largest(lambda b: 10 + 7 * b if 10 + 7 * b <= 100 else None, 100, 2)
    12
    """
    sizes = {first: total(first), 2 * first: total(2 * first)}
    low, high = sizes[first], sizes[2 * first]
    guess = 2 * first
    if low is not None and high is not None:
        guess = max(2 * first, int(2 * first + (room - high) * first / (high - low)))
    while guess and total(guess) is None:
        guess -= 1
    while guess and total(guess + 1) is not None:
        guess += 1
    return guess


def main() -> None:
    """Print a table for the cases, and one for the largest batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of an environment with maxtext[tpu]")
    parser.add_argument("--only", nargs="*", default=[case.name for case in CASES], choices=[case.name for case in CASES], metavar="MODEL")
    parser.add_argument("--largest", action="store_true", help="also the largest batch per chip of the first case")
    options = parser.parse_args()
    print("| model | slice | rows per chip | | temporaries GB | arguments GB | products FLOP | of them recomputed | sent GB | versions |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    sides: dict[str, Callable[[Case, int], Step | None]] = {"ours": cache(ours), "MaxText": cache(lambda *a: theirs(options.peer, *a))}
    chosen = [case for case in CASES if case.name in options.only]
    for case in chosen:
        steps = {who: side(case, case.batch) for who, side in sides.items()}
        for who, step in steps.items():
            print(row(case, case.batch, who, step), flush=True)
        mine, peer = steps["ours"], steps["MaxText"]
        if mine and peer:
            pairs = [(mine.temp_bytes, peer.temp_bytes), (mine.argument_bytes, peer.argument_bytes), (mine.work.flops, peer.work.flops)]
            ratios = " | ".join(f"{a / b:.5f} ×" for a, b in pairs)
            print(f"| {case.name} | | | ours / MaxText | {ratios} | | {mine.sent_bytes / peer.sent_bytes:.3f} × | |", flush=True)
    if options.largest:
        case = chosen[0]
        print("\n| model | slice | | largest rows per chip |\n|---|---|---|---|")
        for who, side in sides.items():

            def total(batch: int, who: str = who, side: Callable[[Case, int], Step | None] = side) -> int | None:
                step = side(case, batch)
                print(row(case, batch, who, step), file=sys.stderr, flush=True)
                return None if step is None or step.total_bytes > ROOM else step.total_bytes

            print(f"| {case.name} | {case.topology} | {who} | {largest(cache(total), ROOM, case.batch)} |", flush=True)


def row(case: Case, batch: int, who: str, step: Step | None) -> str:
    """A line of the first table."""
    head = f"| {case.name} | {case.topology} | {batch} × {case.length} | {who} |"
    if step is None:
        return f"{head} does not fit | | | | | |"
    work = step.work
    return (f"{head} {step.temp_bytes / 1e9:.3f} | {step.argument_bytes / 1e9:.3f} | {work.flops:.7g} | "
            f"{work.recomputed_flops / work.flops:.1%} | {step.sent_bytes / 1e9:.1f} | {step.versions} |")  # fmt: skip


if __name__ == "__main__":
    main()
