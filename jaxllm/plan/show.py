"""A plan for people and for programs: every figure with its unit and with how it was had."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxllm import chips
from jaxllm.plan.arithmetic import group_size
from jaxllm.plan.result import How, Plan, what_would_fit
from jaxllm.plan.search import describe

type Unit = Literal["bytes", "GiB", "FLOP", "seconds", "share", "times", "tokens/s", "days", "chip hours", "", "FLOP/s", "bytes/s"]


@dataclass(frozen=True)
class Figure:
    """One number of a plan."""

    name: str
    value: float
    unit: Unit
    how: How
    note: str = ""


LEGEND = (
    "compiled: by XLA for this machine; counted: exactly, on the program that JAX traced; modelled: by arithmetic; "
    "published: by the chip's maker"
)


def sections(plan: Plan) -> dict[str, list[Figure]]:
    """Everything that a plan says, by subject."""
    return {
        "memory of one chip": list(_memory(plan)),
        "largest buffers": [Figure(b.name, b.num_bytes, "bytes", plan.memory_how, b.why) for b in plan.largest],
        "work of a step": list(_work(plan)),
        "collectives of a step, bytes that one chip sends": list(_collectives(plan)),
        "time of a step, at least": list(_time(plan)),
        "the whole run, at best": list(_run(plan)),
        f"the chip: {plan.chip.name}": list(_chip(plan)),
    }


def _memory(plan: Plan) -> Iterator[Figure]:
    exact = ("parameters", "optimizer", "moving average", "frozen weights")
    for buffer in plan.memory:
        how: How = "counted" if buffer.name in exact and plan.memory_how == "modelled" else plan.memory_how
        yield Figure(buffer.name, buffer.num_bytes, "bytes", how, buffer.why)
    room = plan.chip.memory_bytes
    verdict = f"{plan.memory_bytes / room:.0%} of {room / chips.GIB:.0f} GiB: " + ("fits" if plan.fits else "DOES NOT FIT")
    yield Figure("together", plan.memory_bytes, "bytes", plan.memory_how, verdict)


def _work(plan: Plan) -> Iterator[Figure]:
    work, line = plan.work, plan.roofline
    tokens = line.tokens_per_step
    yield Figure("products, all chips", work.flops, "FLOP", "counted", f"{work.flops / tokens:.4g} FLOP per token")
    yield Figure("products, one chip", work.flops / plan.num_chips, "FLOP", "counted", "an even share")
    if work.kernel_flops:
        yield Figure("of them in kernels", work.kernel_flops, "FLOP", "counted", "a kernel's body over its grid, or a formula")
    if work.recomputed_flops:
        yield Figure("of them recomputed", work.recomputed_flops / work.flops, "share", "counted", f"remat {plan.config.remat}")
    six = 6 * plan.num_params * tokens
    yield Figure("executed / 6N", work.flops / six, "times", "counted", f"6 × {plan.num_params:,} parameters × {tokens:,} tokens")
    note = "6N + 12LHT, attention as PaLM counts it; less 2 for each frozen parameter, and with other models"
    yield Figure("executed / model's", work.flops / line.model_flops, "times", "counted", note)
    yield Figure("other operations", work.other_flops, "FLOP", "counted", "one for each element made; not in MFU or HFU")
    yield Figure("through HBM, one chip", work.hbm_bytes, "bytes", "modelled", "products read and write, all between them fuses")


def _collectives(plan: Plan) -> Iterator[Figure]:
    groups: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for collective in plan.collectives:
        groups[(collective.kind, *collective.axes)].append(collective)
    slices = plan.chip.torus_dims > 0
    for (kind, *axes), members in groups.items():
        sent = sum(c.moved_bytes(group_size(c, plan.mesh)) for c in members)
        times = sum(c.count for c in members)
        over = "data-centre network" if slices and "slice" in axes else "chip links" if slices else "NVLink and network"
        named = [c for c in members if c.what]
        what = f"; mostly {max(named, key=lambda c: c.num_bytes * c.count).what}" if named else ""
        yield Figure(
            f"{kind} over {'+'.join(axes)}",
            sent,
            "bytes",
            plan.collectives_how,
            f"{times:,.0f} × over {over}{what}",
        )


def _time(plan: Plan) -> Iterator[Figure]:
    line = plan.roofline
    how: dict[str, How] = {"compute": "counted"}
    notes = {"compute": f"products / {plan.chip.peak_flops / 1e12:g} TFLOP/s", "memory": "bytes through HBM / its bandwidth"}
    for name, seconds in sorted(line.terms.items(), key=lambda item: -item[1]):
        binding = "binds; " if name == line.binding else ""
        yield Figure(name, seconds, "seconds", how.get(name, "modelled"), binding + notes.get(name, "bytes / bandwidth, no latency"))
    yield Figure("a step, all overlapping", line.seconds, "seconds", "modelled", f"bound by {line.binding}")
    yield Figure("a step, nothing overlapping", line.serial_seconds, "seconds", "modelled")


def _run(plan: Plan) -> Iterator[Figure]:
    line, tokens = plan.roofline, plan.num_tokens
    serial = line.seconds / line.serial_seconds
    yield Figure("tokens/s", line.tokens_per_second, "tokens/s", "modelled", f"{line.tokens_per_second * serial:,.0f} if nothing overlaps")
    yield Figure("MFU", line.mfu, "share", "modelled", f"upper bound, attention as T × T; {line.mfu * serial:.1%} if nothing overlaps")
    if line.causal_mfu is not None:
        note = f"upper bound, attention counted causally; {line.causal_mfu * serial:.1%} if nothing overlaps"
        yield Figure("MFU, causal", line.causal_mfu, "share", "modelled", note)
    yield Figure("HFU", line.hfu, "share", "modelled", f"upper bound; {line.hfu * serial:.1%} if nothing overlaps")
    budget = f"{tokens:,} tokens = {plan.config.num_steps:,} steps × {line.tokens_per_step:,}"
    yield Figure("days", line.days(tokens), "days", "modelled", budget)
    yield Figure("chip hours", line.chip_hours(tokens), "chip hours", "modelled", f"{plan.num_chips:,} chip{'s' * (plan.num_chips != 1)}")


def _chip(plan: Plan) -> Iterator[Figure]:
    chip = plan.chip
    for name, unit in (("peak_flops", "FLOP/s"), ("memory_bytes", "bytes"), ("memory_bytes_per_second", "bytes/s"),
                       ("link_bytes_per_second", "bytes/s"), ("network_bytes_per_second", "bytes/s")):  # fmt: skip
        yield Figure(name.replace("_", " "), getattr(chip, name), unit, "published", chip.sources[name])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- for people


def table(plan: Plan) -> str:
    """The plan as lines of text; its last line says whether it fits."""
    axes = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [f"{plan.target} on {plan.machine}", f"mesh {axes}; precision {plan.precision}; {plan.num_params:,} parameters"]
    found = {title: figures for title, figures in sections(plan).items() if figures}
    rows = {title: [(f.name, written(f.value, f.unit), f.how, f.note) for f in figures] for title, figures in found.items()}
    widths = [max(len(row[i]) for group in rows.values() for row in group) for i in range(3)]
    for title, group in rows.items():
        lines += ["", title]
        lines += [f"  {n:<{widths[0]}}  {v:>{widths[1]}}  {h:<{widths[2]}}  {note}".rstrip() for n, v, h, note in group]
    lines += ["", LEGEND, *(f"note: {note}" for note in plan.notes)]
    lines.append(f"fits in {plan.chip.memory_bytes / chips.GIB:.0f} GiB" if plan.fits else what_would_fit(plan))
    return "\n".join(lines)


def ranking(plans: Sequence[Plan]) -> str:
    """One line for each plan of a search, in the order given."""
    rows = [("fits", "GiB", "s/step", "serial", "MFU ≤", "binds", "flags")]
    for plan in plans:
        line = plan.roofline
        gib = f"{plan.memory_bytes / chips.GIB:.1f}"
        seconds = (f"{line.seconds:.3g}", f"{line.serial_seconds:.3g}", f"{line.mfu:.1%}")
        rows.append(("yes" if plan.fits else "no", gib, *seconds, line.binding, describe(plan.config)))
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    align = lambda i, cell: cell.rjust(widths[i]) if 0 < i < 5 else cell.ljust(widths[i])
    return "\n".join("  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows)


def written(value: float, unit: Unit) -> str:
    """A number with its unit, three or four digits.

    >>> written(7.6 * 2**30, 'bytes'), written(0.4623, 'share'), written(1.672e19, 'FLOP'), written(0.237, 'chip hours')
    ('7.60 GiB', '46.2 %', '1.672e+19 FLOP', '0.237')
    """
    if not math.isfinite(value):
        return "unknown"
    match unit:
        case "bytes":
            power = min(int(math.log(value, 1024)), 5) if value >= 1 else 0
            scaled = value / 1024**power
            return f"{scaled:.{0 if power == 0 else 2 if scaled < 100 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
        case "share":
            return f"{value:.1%}".replace("%", " %")
        case "seconds":
            return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"
        case "times":
            return f"{value:.3f} ×"
        case "FLOP":
            return f"{value:.4g} FLOP"
        case "FLOP/s" | "bytes/s":
            each = "B/s" if unit == "bytes/s" else unit
            return f"{value / 1e12:g} T{each}" if value >= 1e12 else f"{value / 1e9:g} G{each}"
        case "days" | "chip hours":
            return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"
        case _:
            return f"{value:,.0f}"


# ------------------------------------------------------------------------------------------ for programs


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: each figure with its unit and how it was had; bytes and FLOP as whole numbers."""
    plain = lambda f: asdict(f) | {"value": f.value if math.isfinite(f.value) else None}
    return {
        "target": plan.target,
        "machine": plan.machine,
        "chip": plan.chip.name,
        "num_chips": plan.num_chips,
        "mesh": dict(plan.mesh),
        "precision": plan.precision,
        "num_params": plan.num_params,
        "flags": describe(plan.config),
        "fits": plan.fits,
        "binding": plan.roofline.binding,
        "sections": {title: [plain(figure) for figure in figures] for title, figures in sections(plan).items()},
        "notes": list(plan.notes),
    }
