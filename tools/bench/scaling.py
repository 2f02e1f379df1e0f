"""Weak scaling of a step, compiled and not run: bytes of collectives per chip on 16 to 1,024 chips, and compile time by depth.

    python -m tools.bench.scaling                         # llama2-7b's width, 4 layers, 4 rows per chip, on v5e; needs jaxllm[plan]
    python -m tools.bench.scaling --out docs/scaling.md   # the same as a page, with a plot beside it, docs/scaling.svg

Beyond 256 chips there are several slices. Fully sharded data parallelism sends (n − 1)/n of every weight and gradient whatever n is,
so in-slice bytes per chip approach a constant, and between slices one copy of the gradient's shard goes over the network.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from configs.models import llama2_7b
from jaxllm.config import DataConfig, MeshConfig, TrainConfig
from jaxllm.files import write_atomic
from jaxllm.plan import arithmetic
from jaxllm.plan.child import Request, compile_step
from jaxllm.plan.collectives import SLOW_AXIS
from jaxllm.plan.compiled import Compiled
from jaxllm.plan.topology import Topology, parse

SIZES = (("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 1), ("v5e:16x16", 4))


class Point(NamedTuple):
    """One size of machine: gigabytes that one chip sends in a step."""

    machine: Topology
    kinds: dict[str, float]
    """In-slice, by kind of collective."""
    between: float
    """Between slices."""
    model: float
    """In-slice, by `arithmetic`: every weight gathered twice in bf16, every gradient reduced and scattered in float32."""
    temp: float
    seconds: float

    @property
    def inside(self) -> float:
        """In-slice, all kinds."""
        return sum(self.kinds.values())


def recipe(machine: Topology, num_layers: int, rows_per_chip: int, length: int) -> TrainConfig:
    """What is compiled."""
    return TrainConfig(
        model=replace(llama2_7b, num_layers=num_layers),
        data=DataConfig(batch_size=rows_per_chip * machine.num_chips, sequence_length=length, segment_mask=False),
        mesh=MeshConfig(slice=machine.num_slices),
        precision="bfloat16",
    )


def compiled(config: TrainConfig, machine: Topology, *, code: bool = False) -> Compiled:
    """The plan of one point; with `code` the compiler goes on to the end."""
    return compile_step(Request("jaxllm.pretrain:experiment", config, "bfloat16", machine, generate_code=code))


def point(machine: Topology, num_layers: int, rows_per_chip: int, length: int) -> Point:
    """Compile on one machine, and add up."""
    start = time.monotonic()
    config = recipe(machine, num_layers, rows_per_chip, length)
    plan = compiled(config, machine)
    kinds: dict[str, float] = defaultdict(float)
    between = 0.0
    for collective in plan.collectives:
        if SLOW_AXIS in collective.axes:
            between += collective.total_sent_bytes / 1e9
        else:
            kinds[collective.kind] += collective.total_sent_bytes / 1e9
    expected = arithmetic.collectives(config, plan.mesh, "bfloat16", plan.num_params)
    inside = [c for c in expected if SLOW_AXIS not in c.axes]
    model = sum(c.moved_bytes(arithmetic.group_size(c, plan.mesh)) for c in inside) / 1e9
    return Point(machine, dict(kinds), between, model, plan.memory.temp_bytes / 1e9, time.monotonic() - start)


def by_size(options: argparse.Namespace, points: list[Point]) -> Iterator[str]:
    """The first table, a line at a time; the points are appended."""
    yield "| chips | slices | in-slice GB sent per chip | of them | by arithmetic | between slices, GB per chip | temporaries GB | s |"
    yield "|---|---|---|---|---|---|---|---|"
    for topology, num_slices in SIZES:
        found = point(parse(topology, num_slices), options.layers, options.rows, options.length)
        points.append(found)
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in sorted(found.kinds.items(), key=lambda item: -item[1]) if value > 5e-4)
        yield (
            f"| {found.machine.num_chips} | {num_slices} | {found.inside:.3f} | {kinds} | {found.model:.3f} | {found.between:.3f} "
            f"| {found.temp:.2f} | {found.seconds:.0f} |"
        )


def by_depth(options: argparse.Namespace) -> Iterator[str]:
    """The second table: a process of its own for each depth; its CPU seconds are little disturbed by what else runs here."""
    what = "the whole compilation" if options.code else "until memory is assigned"
    yield f"| layers | seconds to trace and lower | seconds to compile, {what} | CPU seconds, both |"
    yield "|---|---|---|---|"
    machine = parse("v5e:16x16")
    for depth in options.depths:
        before = cpu_seconds()
        seconds = compiled(recipe(machine, depth, options.rows, options.length), machine, code=options.code).seconds
        yield f"| {depth} | {seconds['lower']:.1f} | {seconds['compile']:.1f} | {cpu_seconds() - before:.1f} |"


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plot(points: Sequence[Point]) -> str:
    """The first table as SVG: what is sent, in the slice and between slices, and what arithmetic says."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    chips = [p.machine.num_chips for p in points]
    lines = (
        ("in-slice, compiled", [p.inside for p in points], "-", "o"),
        ("in-slice, by arithmetic", [p.model for p in points], "--", ""),
        ("between slices, compiled", [p.between for p in points], "-", "s"),
    )
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 9.0}):
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, values, style, marker in lines:
            axes.plot(chips, values, style, marker=marker, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, [f"{n:,}" for n in chips])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("chips, at a fixed batch per chip")
        axes.set_ylabel("GB that one chip sends in a step")
        axes.grid(axis="y", linewidth=0.5)
        axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def main() -> None:
    """Print both tables; with --out write them and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="rows per chip")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--depths", type=int, nargs="*", default=[12, 24, 48])
    parser.add_argument("--code", action="store_true", help="let the compilations by depth go on to the end")
    parser.add_argument("--out", type=Path, help="a Markdown file; the plot lies beside it")
    options = parser.parse_args()
    points: list[Point] = []
    tables: list[list[str]] = []
    for made in (by_size(options, points), by_depth(options)):
        tables.append([])
        print()
        for text in made:
            tables[-1].append(text)
            print(text, flush=True)
    if options.out:
        image = options.out.with_suffix(".svg")
        write_atomic(image, plot(points).encode())
        write_atomic(options.out, page(options, tables, image.name).encode())


def page(options: argparse.Namespace, tables: Sequence[Sequence[str]], image: str) -> str:
    """What --out writes."""
    import jax

    sizes, depths = ("\n".join(table) for table in tables)
    what = f"llama2-7b's width, {options.layers} layers, {options.rows} rows of {options.length:,} tokens per chip"
    return (
        f"# Weak scaling on TPU v5e, compiled and not run\n\n"
        f"`{shlex.join(['python', '-m', 'tools.bench.scaling', *sys.argv[1:]])}`, {datetime.date.today()}, jax {jax.__version__}: "
        f"{what}, weights and batch over all chips, full remat, bf16. From 1,024 chips on there are several slices of 256.\n\n"
        f"![bytes that one chip sends in a step, by number of chips]({image})\n\n{sizes}\n\n"
        "A chip sends (n − 1)/n of every weight and every gradient whatever n is, and between slices its shard of the gradients once. "
        "By arithmetic: every weight gathered in bf16 for the forward and again for the backward pass, every gradient reduced and "
        f"scattered in float32.\n\n## Compile time by depth, on v5e:16x16\n\n{depths}\n"
    )


if __name__ == "__main__":
    main()
