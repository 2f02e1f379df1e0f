"""A run directory as one self-contained HTML page: `write_report(run_dir)` reads files and nothing else.

The page has no script and fetches nothing; plots are inline SVG. Every file may be missing, torn or half a run old, because
a report is wanted most when something went wrong: what is missing is said in its place. Only `config.json` must be there,
since a folder without one is no run directory.

    config.json        {"config": {...}, "hash":, "name":, "parent":}
    metrics.jsonl      see `jaxllm/metrics.py`; `metrics.cut-<n>.jsonl` beside it
    results.json       {"bits_per_byte":, "baselines": [{"name":, "bits_per_byte":, "note":}], "num_params":, "tokens_seen":,
                        "wall_seconds":, "go_on": command, "generate": command}
    samples.jsonl      {"step":, "prompt":, "completion":}
    environment.json, data.json     anything nested
    checkpoints/<step>
"""

from __future__ import annotations

import html
import io
import json
import math
import re
import shlex
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import __version__
from jaxllm.config import ConfigError
from jaxllm.metrics import RESERVED, duration, read_lines, write_atomic

type Series = tuple[np.ndarray, np.ndarray]
"""(steps, values) of one metric, steps rising; nan where a value was not finite."""


@dataclass(frozen=True)
class Run:
    """What a run directory holds. A JSON file that is missing or broken is {}, and `problems` says which by its name."""

    path: Path
    config: dict[str, Any]
    results: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    problems: dict[str, str]

    def series(self, kind: str, name: str) -> Series:
        """One metric over steps. Where a step was recorded twice, the later record counts."""
        found = {r["step"]: r[name] for r in self.records if r.get("kind") == kind and name in r}
        steps = sorted(found)
        return np.array(steps, float), np.array([_number(found[s], math.nan) for s in steps], float)

    def names(self, kind: str) -> list[str]:
        """Metrics that records of this kind have, in order of appearance."""
        return [n for n in dict.fromkeys(n for r in self.records if r.get("kind") == kind for n in r) if n not in RESERVED]


def load(run_dir: Path | str) -> Run:
    """Read a run directory.

    Raises:
      ConfigError: it has no `config.json`.
    """
    path = Path(run_dir)
    if not (path / "config.json").exists():
        raise ConfigError(f"{path} is not a run directory: it has no config.json; give the folder that `jaxllm train` printed")
    problems: dict[str, str] = {}

    def read_json(name: str) -> dict[str, Any]:
        try:
            value = json.loads((path / name).read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            problems[name] = f"There is no {name} yet."
        except ValueError as error:
            problems[name] = f"{name} could not be read: {error}."
        else:
            if isinstance(value, dict):
                return value
            problems[name] = f"{name} could not be read: it holds no JSON object."
        return {}

    config, results, environment, data = map(read_json, ("config.json", "results.json", "environment.json", "data.json"))
    records, samples = ([r for r in read_lines(path / name) if _is_number(r.get("step"))] for name in ("metrics.jsonl", "samples.jsonl"))
    return Run(path, config, results, environment, data, records, samples, problems)


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into the run directory from the files there, replacing an older one in one step; returns its path."""
    run = load(run_dir)
    sections = (
        ("Loss", _loss),
        ("Training", _panels),
        ("Samples", _samples),
        ("Go on", _commands),
        ("Events", _events),
        ("Data", lambda run: _facts_file(run, run.data, "data.json")),
        ("Checkpoints", _checkpoints),
        ("Environment", lambda run: _facts_file(run, run.environment, "environment.json")),
        ("Configuration", _configuration),
    )
    body = "".join(f"<section>\n<h2>{title}</h2>\n{draw(run)}\n</section>\n" for title, draw in sections)
    page = PAGE.format(title=_text(_name(run)), css=CSS, header=_header(run), body=body, footer=_footer(run))
    target = run.path / "report.html"
    write_atomic(target, page.encode(errors="replace"))  # half a surrogate pair has no encoding
    return target


# ------------------------------------------------------------------------------------------ sections


def _header(run: Run) -> str:
    config = run.config.get("config") if isinstance(run.config.get("config"), dict) else {}
    assert isinstance(config, dict)
    last = max((int(r["step"]) for r in run.records), default=0)
    total = _number(config.get("num_steps"))
    status = [f"step {last:,} of {total:,.0f}" if total else f"step {last:,}"]
    if run.config.get("hash"):
        status.append(f"config {_text(run.config['hash'])}")
    if run.config.get("parent"):
        status.append(f"starts from the weights of {_text(run.config['parent'])}")
    title = f'<p class="eyebrow">Training run · {" · ".join(status)}</p>\n<h1>{_text(_name(run))}</h1>\n'
    broken = [text for name, text in run.problems.items() if "could not" in text or name == "config.json"]
    notes = "".join(f'<p class="note warn">{_text(text)}</p>\n' for text in broken)
    return title + notes + _headline(run) + _key_facts(run)


def _headline(run: Run) -> str:
    """Held-out bits per byte as the largest thing on the page, and as a bar among the baselines' bars."""
    own = _number(run.results.get("bits_per_byte"))
    if own is None:
        return _missing(f"{run.problems.get('results.json', 'results.json has no bits_per_byte.')} The run has no final result.")
    baselines = run.results.get("baselines")
    rows = [b for b in baselines if isinstance(b, dict)] if isinstance(baselines, list) else []
    others = [
        (str(b.get("name", "?")), bits, str(b.get("note", ""))) for b in rows if (bits := _number(b.get("bits_per_byte"))) is not None
    ]
    beaten = min((o for o in others if o[1] > own), key=lambda o: o[1], default=None)
    ahead = max((o for o in others if o[1] <= own), key=lambda o: o[1], default=None)
    said = []
    if beaten:
        said.append(f"{1 - own / beaten[1]:.0%} fewer than {_text(beaten[0])} ({beaten[1]:.2f}).".replace("%", " %"))
    if ahead:
        said.append(f"Still ahead: {_text(ahead[0])} ({ahead[1]:.2f}).")
    error = _number(run.results.get("bits_per_byte_standard_error"))
    around = f" ± {error:.2g}" if error else ""
    headline = (
        f'<p class="headline"><span class="figure">{own:.2f}</span> <span class="unit">bits per byte<br>'
        f'<span class="muted">on held-out text{around}, lower is better</span></span></p>\n<p class="lede">{" ".join(said)}</p>\n'
    )
    bars = sorted([("This model", own, ""), *others], key=lambda o: -o[1])
    widest = max(bits for _, bits, _ in bars) or 1.0
    drawn = ""
    for i, (name, bits, note) in enumerate(bars):
        own_row = " class=own" if i == bars.index(("This model", own, "")) else ""
        small = f"<small>{_text(note)}</small>" if note else ""
        bar = f'<span class="bar" style="width:{100 * bits / widest:.2f}%"></span>'
        drawn += f'<tr{own_row}><th scope="row">{_text(name)}{small}</th><td>{bar}</td><td class="number">{bits:.2f}</td></tr>\n'
    return headline + f'<table class="bars" aria-label="Bits per byte">\n{drawn}</table>\n'


def _key_facts(run: Run) -> str:
    """The numbers that one asks for next, as a row."""
    facts: list[tuple[str, str]] = []

    def add(label: str, value: Any, show: Callable[[float], str]) -> None:
        number = _number(value)
        if number is not None:
            facts.append((label, show(number)))

    def usual(name: str) -> float | None:
        values = run.series("train", name)[1]
        return float(np.nanmedian(values)) if np.isfinite(values).any() else None

    add("Parameters", run.results.get("num_params"), _human)
    add("Tokens seen", run.results.get("tokens_seen", max(run.series("train", "tokens")[1], default=None)), _human)
    add("Held-out perplexity", run.results.get("perplexity"), lambda x: f"{x:,.2f}")
    add("Wall time", run.results.get("wall_seconds"), duration)
    add("Tokens per second", usual("tokens_per_second"), lambda x: f"{x:,.0f}")
    add("MFU", usual("mfu"), _percent)
    items = "".join(f"<div><dt>{label}</dt><dd>{_text(value)}</dd></div>" for label, value in facts)
    return f'<dl class="facts">{items}</dl>\n' if facts else ""


def _loss(run: Run) -> str:
    train, held_out = run.series("train", "loss"), run.series("eval", "loss")
    if not np.isfinite(train[1]).any():
        return _missing(f"metrics.jsonl has {len(run.records)} records, and none with a training loss.")
    marks = [(float(r["step"]), str(r.get("event", "event"))) for r in _happened(run) if r.get("event") in ("resume", "spike")]
    figure, above = _loss_figure(train, held_out, run.series("train", "tokens"), marks)
    caption = "Nats per token. Faint: each record; solid: a running mean"
    caption += "; with dots: held-out text." if np.isfinite(held_out[1]).any() else ". Held-out text was not evaluated yet."
    if above:
        caption += f" The first steps, from {above:.2f}, lie above the frame."
    return f'<figure class="wide">{figure}<figcaption>{caption}</figcaption></figure>'


PANELS: tuple[tuple[str, tuple[str, ...], Callable[[float], str], bool], ...] = (
    ("Learning rate", ("lr",), lambda x: f"{x:.2e}", True),
    ("Gradient norm", ("grad_norm",), lambda x: f"{x:.3g}", True),
    ("Tokens per second", ("tokens_per_second",), lambda x: f"{x:,.0f}", True),
    ("Utilisation", ("mfu", "hfu"), lambda x: _percent(x), True),
    ("log Z", ("log_z",), lambda x: f"{x:.3g}", False),
)
"""(title, metrics, how the last value is shown, whether the axis starts at 0)."""


def _panels(run: Run) -> str:
    """One small plot for each group of metrics; those without a place of their own are folded away below."""
    names = run.names("train")
    known = {"tokens", "loss"} | {name for panel in PANELS for name in panel[1]}
    shown = [_panel(run, *panel) for panel in PANELS if any(name in names for name in panel[1])]
    others = [_panel(run, name, (name,), lambda x: f"{x:.4g}", False) for name in names if name not in known]
    if not shown and not others:
        return _missing("metrics.jsonl has no training metrics.")
    out = f'<div class="panels">{"".join(shown)}</div>'
    if others:
        out += f'<details><summary>All other metrics ({len(others)})</summary><div class="panels">{"".join(others)}</div></details>'
    return out


def _panel(run: Run, title: str, names: tuple[str, ...], show: Callable[[float], str], from_zero: bool) -> str:
    lines = [(name, run.series("train", name)) for name in names]
    lines = [(name, series) for name, series in lines if np.isfinite(series[1]).any()]
    colours = (COLOURS[TRAIN], COLOURS[HELD]) if len(lines) > 1 else ("inherit",)
    last = ""
    for (name, (_, values)), colour in zip(lines, colours, strict=False):
        label = f"{name.upper()} " if len(lines) > 1 else ""
        last += f'<span style="color:{colour}">{_text(label + show(float(values[np.isfinite(values)][-1])))}</span> '
    figure = _panel_figure(title, lines, from_zero) if lines else ""
    return f"<figure><figcaption><b>{_text(title)}</b><span>{last or 'no finite value'}</span></figcaption>{figure}</figure>"


def _samples(run: Run) -> str:
    """Completions of the last sampled step, earlier ones folded away."""
    by_step: dict[int, dict[str, str]] = {}
    for sample in run.samples:
        by_step.setdefault(int(sample["step"]), {})[str(sample.get("prompt", ""))] = str(sample.get("completion", ""))
    if not by_step:
        return _missing("There are no samples.")

    def draw(step: int) -> str:
        pres = "".join(
            f'<pre class="sample"><span class="prompt">{_text(p)}</span><span class="completion">{_text(c)}</span></pre>\n'
            for p, c in by_step[step].items()
        )
        return f'<p class="muted">At step {step:,}. The prompt is grey, what the model wrote is not.</p>\n{pres}'

    *earlier, last = sorted(by_step)
    folded = "".join(f"<details><summary>Step {step:,}</summary>{draw(step)}</details>\n" for step in reversed(earlier))
    return draw(last) + folded


def _commands(run: Run) -> str:
    go_on = run.results.get("go_on")
    generate = run.results.get("generate") or f"jaxllm generate {shlex.quote(str(run.path))} --prompt 'Once upon a time'"
    rows = [("Train further", go_on), ("Generate", generate)]
    lines = [f"<p>{label}</p>\n<pre>{_text(command)}</pre>\n" for label, command in rows if command]
    return "".join(lines) + (
        "" if go_on else _missing("How to train further is not recorded: the same command that started the run resumes it.")
    )


def _events(run: Run) -> str:
    """Resumes, spikes, warnings, records that were cut and values that were not finite, by step."""
    rows = [(r["step"], str(r.get("event", "event")), str(r.get("message", ""))) for r in _happened(run)]
    rows += [
        (r["step"], "not finite", f"{r.get('kind', '?')}: {', '.join(map(str, r['nonfinite']))}")
        for r in run.records
        if isinstance(r.get("nonfinite"), list)
    ]
    for path in sorted(run.path.glob("metrics.cut-*.jsonl")):
        steps = [r["step"] for r in read_lines(path) if _is_number(r.get("step"))]
        if steps:
            message = f"{len(steps)} records up to step {max(steps):,} were trained again; they are kept in {path.name}"
            rows.append((min(steps), "cut back", message))
    if not rows:
        return _missing("Nothing out of the ordinary was recorded.")
    rows.sort(key=lambda row: row[0])
    return _table([(f"{step:,}", what, message) for step, what, message in rows], ("Step", "What", "Detail"), numbers=(0,))


def _happened(run: Run) -> list[dict[str, Any]]:
    return [r for r in run.records if r.get("kind") == "event"]


BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def _checkpoints(run: Run) -> str:
    """A checkpoint is complete when each process that wrote it left its manifest; nothing is verified here."""
    rows = []
    folder = run.path / "checkpoints"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = re.fullmatch(r"(corrupt-)?(\d+)", path.name)
        if name and path.is_dir():
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            counts = [int(f.stem.rsplit("-", 1)[1]) for f in path.glob("manifest-*-of-*.json")]
            whole = bool(counts) and len(counts) == counts[0]
            state = "damaged, set aside" if name[1] else "complete" if whole else "incomplete"
            rows.append((int(name[2]), _human(size, BYTE_UNITS), state, _date(path.stat().st_mtime), f"checkpoints/{path.name}"))
    if not rows:
        return _missing("There are no checkpoints.")
    table = [(f"{step:,}", *rest) for step, *rest in sorted(rows)]
    return _table(table, ("Step", "Size", "State", "Written", "Folder"), numbers=(0, 1))


def _facts_file(run: Run, values: dict[str, Any], name: str) -> str:
    return _table(_flat(values)) if values else _missing(run.problems.get(name, f"{name} is empty."))


def _configuration(run: Run) -> str:
    config = run.config.get("config")
    if not isinstance(config, dict):
        return _missing(run.problems.get("config.json", "config.json has no config."))
    plain = {name: value for name, value in config.items() if not isinstance(value, dict)}
    groups = [("train", plain), *((name, value) for name, value in config.items() if isinstance(value, dict))]
    return "".join(
        f"<details><summary>{_text(name)} <small>{len(_flat(values))} values</small></summary>{_table(_flat(values))}</details>\n"
        for name, values in groups
        if values
    )


def _footer(run: Run) -> str:
    times = [float(r["time"]) for r in run.records if _is_number(r.get("time"))]
    when = f" Last record: {_date(max(times))}." if times else ""
    return f"Written by jaxllm {__version__} from the files in {_text(run.path.name or run.path)}.{when}"


# ------------------------------------------------------------------------------------------- figures

COLOURS = {
    "#000001": "var(--ink)",
    "#000002": "var(--muted)",
    "#000003": "var(--rule)",
    "#000004": "var(--train)",
    "#000005": "var(--held)",
}
"""Stand-ins that matplotlib draws with, and the page's own colours, so that one SVG serves light and dark."""
INK, MUTED, RULE, TRAIN, HELD = COLOURS


def _loss_figure(train: Series, held_out: Series, tokens: Series, marks: Sequence[tuple[float, str]]) -> tuple[str, float | None]:
    """Loss over steps, tokens along the top. Returns (SVG, the highest early loss that the frame leaves out, or None)."""
    figure, axes = _axes(9.0, 3.7)
    steps, smooth = _line(axes, train, TRAIN)
    # A fall from ln V to the final loss would flatten all that follows: the frame holds what comes after the first tenth.
    shown = np.concatenate([y[x >= train[0][0] + 0.1 * np.ptp(train[0])] for x, y in (train, held_out)])
    if not np.isfinite(shown).any():
        shown = train[1]
    low, high = np.nanmin(shown), np.nanmax(shown)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    above = float(np.nanmax(train[1])) if np.nanmax(train[1]) > high + margin else None
    ends = [("train", steps[-1], smooth[-1], TRAIN)]
    finite = np.isfinite(held_out[1])
    if finite.any():
        x, y = held_out[0][finite], held_out[1][finite]
        axes.plot(x, y, color=HELD, linewidth=1.4, marker="o", markersize=3.5)
        ends.append(("held out", x[-1], y[-1], HELD))
    # Names at the ends of the lines instead of a legend; apart by at least the height of a line of text.
    apart = 0.075 * (high - low + 2 * margin)
    ends.sort(key=lambda end: end[2])
    heights = [ends[0][2], max(ends[1][2], ends[0][2] + apart)] if len(ends) == 2 else [ends[0][2]]
    right = max(float(train[0][-1]), *(end[1] for end in ends))
    for (name, _, value, colour), height in zip(ends, heights, strict=True):
        axes.annotate(f"{name} {value:.2f}", (right, height), (7, 0), textcoords="offset points", va="center", color=colour, weight="bold")
    for step, name in marks:
        axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.annotate(name, (step, 1), (4, -3), xycoords=("data", "axes fraction"), textcoords="offset points", va="top", color=MUTED)
    axes.set_xlim(0, 1.004 * right or 1.0)  # room for the last marker
    _unit(axes, "steps", 0)
    _token_axis(axes, tokens)
    return _svg(figure, "Training and held-out loss over steps"), above


def _token_axis(axes: Any, tokens: Series) -> None:
    """A second axis along the top: the tokens seen by each step, which need not be proportional (batch ramps)."""
    good = np.isfinite(tokens[1])
    x, y = np.append(0.0, tokens[0][good]), np.append(0.0, tokens[1][good])
    rising = np.append(True, (np.diff(x) > 0) & (np.diff(y) > 0))
    if len(x) < 2 or not rising.all():
        return
    from matplotlib.ticker import MaxNLocator

    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    ticks = [t for t in MaxNLocator(6).tick_values(0, y[-1]) if 0 <= t <= y[-1]]
    top.set_xticks(np.interp(ticks, y, x), [_human(t) for t in ticks])
    _unit(axes, "tokens", 1)
    top.tick_params(length=0, labelcolor=MUTED)
    for side in top.spines.values():
        side.set_visible(False)


def _unit(axes: Any, name: str, height: int) -> None:
    """The name of a horizontal axis in the row of its tick labels, right of the last one."""
    at = (26, 8 if height else -8)
    axes.annotate(name, (1, height), at, xycoords="axes fraction", textcoords="offset points", va="center", color=MUTED)


def _panel_figure(title: str, lines: Sequence[tuple[str, Series]], from_zero: bool) -> str:
    figure, axes = _axes(4.4, 1.9)
    for (name, series), colour in zip(lines, (TRAIN, HELD), strict=False):
        _line(axes, series, colour, smooth=name != "lr")  # a schedule has corners and no noise
    values = np.concatenate([series[1] for _, series in lines])
    low, high = np.nanpercentile(values, [0, 100])
    if from_zero and low >= 0:
        # One wild value (the first step, or one that waited for a save) may not flatten the rest.
        high = min(high, 3 * np.nanpercentile(values, 90))
        axes.set_ylim(0, 1.1 * high or 1.0)
    elif low == high:
        axes.set_ylim(low - max(abs(low) * 0.1, 0.1), high + max(abs(low) * 0.1, 0.1))
    axes.set_xlim(0, max(float(series[0][-1]) for _, series in lines) or 1.0)
    axes.locator_params(nbins=4)
    if {"mfu", "hfu"} & {name for name, _ in lines}:
        axes.yaxis.set_major_formatter(lambda x, _: _percent(x, 0))
    elif high >= 1000:
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    elif high < 0.01:
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:.1e}".replace("e-0", "e-") if x else "0")
    return _svg(figure, f"{title} over steps")


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure of so many inches with quiet axes: horizontal grid lines and nothing else."""
    from matplotlib.figure import Figure  # slow to import, so only once a plot is drawn

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=MUTED)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    return figure, axes


def _line(axes: Any, series: Series, colour: str, smooth: bool = True) -> Series:
    """Every value faint and the running mean solid, or the values alone; returns the solid line."""
    finite = np.isfinite(series[1])
    x, y = series[0][finite], series[1][finite]
    if smooth:
        axes.plot(*_thin(*series), color=colour, alpha=0.28, linewidth=0.8)
        y = _running_mean(y)
    keep = np.unique(np.linspace(0, len(x) - 1, 600).round().astype(int))
    axes.plot(x[keep], y[keep], color=colour, linewidth=1.6, marker="o" if len(x) == 1 else None, markersize=3.5)
    return x, y


def _running_mean(y: np.ndarray) -> np.ndarray:
    """Mean over i ± n/60, twice; at the start, where a loss falls steeply, over i ± i/4, so that the mean follows the fall."""
    n = len(y)
    index = np.arange(n)
    half = np.minimum(index // 4, n // 60)
    low, high = index - half, np.minimum(index + half + 1, n)
    for _ in range(2):
        sums = np.append(0.0, np.cumsum(y))
        y = (sums[high] - sums[low]) / (high - low)
    return y


def _thin(x: np.ndarray, y: np.ndarray, num_groups: int = 600) -> Series:
    """At most 2 points for each of `num_groups` stretches, the lowest and the highest: a long run's spikes stay visible."""
    if len(x) <= 2 * num_groups:
        return x, y
    keep = set()
    for group in np.array_split(np.arange(len(x)), num_groups):
        finite = group[np.isfinite(y[group])]
        if len(finite):
            keep |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def _svg(figure: Any, label: str) -> str:
    """The figure as inline SVG: text stays text, colours become the page's, ids are made unique to the page."""
    import matplotlib as mpl

    name = f"plot{zlib.crc32(label.encode()):08x}"
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.0, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-label="{_text(label)}">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg


# ---------------------------------------------------------------------------------- words and tables


CONTROL = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {127: 0x2421}
"""Control characters, which a model of bytes may write and HTML may not hold, to the pictures of them that Unicode has."""


def _text(value: Any) -> str:
    return html.escape(str(value).translate(CONTROL), quote=True)


def _missing(message: str) -> str:
    return f'<p class="note">{_text(message)}</p>'


def _name(run: Run) -> str:
    return str(run.config.get("name") or run.path.name)


def _table(rows: Iterable[Sequence[Any]], header: Sequence[str] = (), numbers: Sequence[int] = ()) -> str:
    def cells(row: Sequence[Any], tag: str) -> str:
        return "".join(f"<{tag}{' class=number' if i in numbers else ''}>{_text(cell)}</{tag}>" for i, cell in enumerate(row))

    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in rows)
    return f'<div class="scroll"><table{"" if header else " class=facts-table"}>{head}<tbody>\n{body}</tbody></table></div>'


def _flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted path, value) for each leaf of nested dicts and lists; a list of plain values is one leaf."""
    if isinstance(values, list) and any(isinstance(v, dict | list) for v in values):
        values = dict(enumerate(values))
    if isinstance(values, dict) and values:
        return [leaf for name, value in values.items() for leaf in _flat(value, f"{prefix}{name}.")]
    if isinstance(values, int) and not isinstance(values, bool) and abs(values) >= 10_000:
        return [(prefix[:-1], f"{values:,}")]
    return [(prefix[:-1], values if isinstance(values, str) and values else json.dumps(values, ensure_ascii=False))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # False for nan


def _number(value: Any, default: float | None = None) -> Any:
    return float(value) if _is_number(value) else default


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "unknown"


def _percent(ratio: float, digits: int = 1) -> str:
    return f"{100 * ratio:.{digits}f} %"


def _human(number: float, units: Sequence[tuple[float, str]] = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))) -> str:
    """Three digits and a unit: 12,288,000 is 12.3 M."""
    return next((f"{number / size:.3g} {unit}" for size, unit in units if number >= size), f"{number:.3g}")


# ---------------------------------------------------------------------------------------------- page

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<header>
{header}</header>
{body}<footer>{footer}</footer>
</main>
</body>
</html>
"""

CSS = """
:root { --paper: #fcfcfa; --ink: #1c1e22; --muted: #6c7179; --rule: #e3e3dd; --wash: #f3f3ee; --train: #2c5cc5; --held: #b8501a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141619; --ink: #e7e7e3; --muted: #969ca5; --rule: #2c3036; --wash: #1b1e22; --train: #82a9ff; --held: #f0a264; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 4.5rem 1.5rem 4rem; }
section { margin-top: 4.5rem; }
h1 { font-size: 2.1rem; line-height: 1.15; font-weight: 650; letter-spacing: -0.015em; margin: 0.3rem 0 2.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 0 0 1.2rem; padding-top: 0.9rem; border-top: 1px solid var(--rule); }
small, figcaption, .muted, .note, .eyebrow, footer { color: var(--muted); }
.eyebrow { font-size: 0.85rem; margin: 0; }
.headline { display: flex; align-items: flex-end; gap: 1rem; margin: 0; }
.headline .figure { font-size: 4.6rem; line-height: 1; font-weight: 600; letter-spacing: -0.035em; color: var(--train); }
.headline .unit { line-height: 1.35; font-weight: 600; padding-bottom: 0.35rem; }
.headline .muted { font-weight: 400; }
.lede { margin: 1rem 0 1.8rem; }
.bars { table-layout: fixed; }
.bars th, .bars td { vertical-align: middle; border: 0; }
.bars th { width: 17rem; padding: 0.45rem 1rem 0.45rem 0; font-weight: 400; line-height: 1.3; color: var(--ink); }
.bars th small { display: block; font-size: 0.8rem; }
.bars .number { width: 3.5rem; padding-right: 0; }
.bar { display: block; height: 1.15rem; background: var(--muted); opacity: 0.38; border-radius: 1px; }
.own .bar { background: var(--train); opacity: 1; }
.own th, .own .number { font-weight: 650; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.4rem, 1fr)); gap: 1.2rem 1.5rem; margin: 2.6rem 0 0; }
.facts dt { font-size: 0.8rem; color: var(--muted); }
.facts dd { margin: 0; font-size: 1.2rem; font-weight: 550; }
figure { margin: 0; overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; font-family: inherit; }
figure.wide svg { min-width: 36rem; }
figcaption { font-size: 0.85rem; margin-top: 0.6rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 2.2rem 2.5rem; }
.panels figcaption { display: flex; justify-content: space-between; margin: 0 0 0.4rem; }
.panels figcaption b { color: var(--ink); font-weight: 550; }
table { width: 100%; border-collapse: collapse; font-size: 0.9rem; }
th { font-weight: 550; text-align: left; color: var(--muted); }
th, td { padding: 0.4rem 1.2rem 0.4rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; width: 1%; }
.scroll { overflow-x: auto; }
.facts-table td:first-child { width: 38%; color: var(--muted); }
pre { font: 0.84rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; background: var(--wash); margin: 0 0 1rem;
  padding: 0.9rem 1.1rem; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.sample .prompt { color: var(--muted); }
.sample .completion { color: var(--ink); }
details { border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; padding: 0.55rem 0; font-weight: 550; font-size: 0.95rem; }
summary small { font-weight: 400; margin-left: 0.4rem; }
details[open] { padding-bottom: 1.2rem; }
.panels + details { margin-top: 2rem; }
.warn { color: var(--held); }
footer { margin-top: 5rem; font-size: 0.82rem; }
@media (max-width: 40rem) {
  main { padding-top: 2rem; }
  .bars th { width: 9rem; }
  .headline .figure { font-size: 3.4rem; }
}
@media print { section { break-inside: avoid; } }
"""
