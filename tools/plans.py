"""Plan every `paper` preset of every experiment on the machine that its paper used.

    python -m tools.plans                               # all; for TPUs it needs jaxllm[plan]
    python -m tools.plans --only pretrain --out FILE.md

An experiment names the machine of each of its paper presets by the command in its docstring, or as options of `jaxllm plan`:

        jaxllm plan experiments/lora.py:paper --gpus v100:1x1

    PAPER_HARDWARE = {"paper": ("--topology", "v4:4x4x4"), "paper_540b": ("--topology", "v4:12x16x16", "--slices", "2")}

Of a study the first arm that trains is planned. Exit code 1: one of them does not plan, does not fit, or names no machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm import cli
from jaxllm.config import ConfigError
from jaxllm.files import write_atomic
from jaxllm.plan.show import written

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


class Paper(NamedTuple):
    """One preset of one experiment."""

    target: str
    machine: tuple[str, ...]
    """Options of `jaxllm plan`; empty where the experiment names none."""

    @property
    def name(self) -> str:
        """`pretrain:paper`."""
        return self.target.rpartition("/")[2].replace(".py", "")

    @property
    def words(self) -> list[str]:
        """After `jaxllm`."""
        return ["plan", self.target, *self.machine]


class Row(NamedTuple):
    """What planning one of them gave."""

    paper: Paper
    ok: bool
    seconds: float
    plan: dict[str, Any]
    """The plan's JSON; empty without one."""
    message: str
    """The last line that was printed."""


def papers(folder: Path = EXPERIMENTS) -> list[Paper]:
    """Every preset of every experiment whose name begins with `paper`."""
    found = []
    for path in sorted(folder.glob("[!_]*.py")):
        module = cli.load_file(path)
        written_out = re.findall(rf"(?m)jaxllm plan \S*{path.name}:(\w+) +(--.*)$", module.__doc__ or "")
        machines = {name: shlex.split(words) for name, words in written_out} | getattr(module, "PAPER_HARDWARE", {})
        presets = [name for name in getattr(module, "PRESETS", {}) if name.startswith("paper")]
        found += [Paper(f"{path}:{name}", tuple(machines.get(name, ()))) for name in presets]
    return found


def plan(paper: Paper) -> Row:
    """Plan one preset in a process of its own."""
    if not paper.machine:
        module, preset = paper.target.rsplit(":", 1)
        wanted = f"`jaxllm plan experiments/{Path(module).name}:{preset} --topology …`"
        return Row(paper, False, 0.0, {}, f"names no machine; write in its docstring: {wanted}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jaxllm-plans-") as folder:
        out = Path(folder, "plan.json")
        command = [sys.executable, "-m", "jaxllm.cli", *paper.words, "--code", "False", "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        found = json.loads(out.read_text()) if out.exists() else {}
    lines = (done.stdout if done.returncode == 0 or found else done.stdout + done.stderr).strip().splitlines()
    return Row(paper, done.returncode == 0, time.monotonic() - start, found, lines[-1] if lines else f"exit status {done.returncode}")


def line(row: Row) -> str:
    """A row of the table."""
    command = f"`jaxllm {shlex.join(row.paper.words).replace(str(EXPERIMENTS.parent) + '/', '')}`"
    if not row.plan:
        return f"| {row.paper.name} | {row.message} | | | | | {row.seconds:.0f} | {command} |"
    figures = {figure["name"]: figure for group in row.plan["sections"].values() for figure in group}
    value = lambda name: written(figures[name]["value"], figures[name]["unit"])
    fits = value("together") + ("" if row.ok else ": DOES NOT FIT")
    fits += f" ({figures['together']['how']})"
    step = f"{value('a step, all overlapping')} ({row.plan['binding']})"
    machine, params = row.plan["machine"], f"{row.plan['num_params']:,}"
    cells = (row.paper.name, machine, params, fits, step, value("MFU"), f"{row.seconds:.0f}", command)
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| preset | machine | parameters | memory per chip | step, at least (bound by) | MFU, at most | seconds to plan | command |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan them one after the other, printing each line when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="EXPERIMENT", help="file names without .py")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args(arguments)
    try:
        every = papers()
    except ConfigError as error:  # a file that cannot be imported
        print(f"plans: {error}", file=sys.stderr)
        return 2
    unknown = set(options.only) - {paper.name.partition(":")[0] for paper in every}
    if unknown:
        parser.error(f"no experiment with a paper preset is called {', '.join(sorted(unknown))}")
    rows, lines = [], [HEAD]
    print(HEAD, flush=True)
    for paper in every:
        if not options.only or paper.name.partition(":")[0] in options.only:
            rows.append(plan(paper))
            lines.append(line(rows[-1]))
            print(lines[-1], flush=True)
    if options.out:
        write_atomic(options.out, ("\n".join(lines) + "\n").encode())
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
