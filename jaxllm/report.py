"""A run directory as one self-contained HTML page: `write_report(run_dir)` reads files and nothing else.

The page has no script and fetches nothing; plots are inline SVG. Every file may be missing, torn or half a run old, because
a report is wanted most when something went wrong: what is missing is said in its place. Only `config.json` must be there,
since a folder without one is no run directory.

    config.json        {"config": {...}, "hash":, "name":, "parent":}
    metrics.jsonl      see `jaxllm/metrics.py`; `metrics.cut-<n>.jsonl` beside it
    results.json       {"steps":, "bits_per_byte":, "baselines": [{"name":, "bits_per_byte":, "note":}], "num_params":, "tokens_seen":,
                        "wall_seconds":, "go_on": command, "generate": command}
    samples.jsonl      {"step":, "prompt":, "completion":}
    environment.json, data.json     anything nested
    checkpoints/<step>
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import __version__
from jaxllm.config import ConfigError
from jaxllm.files import listing, path_of, write_atomic
from jaxllm.metrics import RESERVED, duration, read_lines
from jaxllm.report_figures import COLOURS, HELD, TRAIN, Series, escape, human, loss_figure, panel_figure, percent


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
    path = path_of(run_dir)
    if not (path / "config.json").exists():
        raise ConfigError(f"{path} is not a run directory: it has no config.json; give the folder that `jaxllm train` printed")
    problems: dict[str, str] = {}

    def read_json(name: str) -> dict[str, Any]:
        try:
            value = json.loads((path / name).read_bytes().decode(errors="replace"))
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
    asked, steps = config.get("config"), _number(results.get("steps"))
    planned = _number(asked.get("num_steps")) if isinstance(asked, dict) else None
    if steps is not None and planned is not None and steps != planned:
        problems["results.json"] = f"results.json is of step {steps:,.0f}, where the run ended before it went on to {planned:,.0f}."
        results = {}
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
    css = resources.files("jaxllm").joinpath("report.css").read_text(encoding="utf-8")
    page = PAGE.format(title=escape(_name(run)), css=css, header=_header(run), body=body, footer=_footer(run))
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
        status.append(f"config {escape(run.config['hash'])}")
    if run.config.get("parent"):
        status.append(f"starts from the weights of {escape(run.config['parent'])}")
    title = f'<p class="eyebrow">Training run · {" · ".join(status)}</p>\n<h1>{escape(_name(run))}</h1>\n'
    broken = [text for name, text in run.problems.items() if "could not" in text or name == "config.json"]
    notes = "".join(f'<p class="note warn">{escape(text)}</p>\n' for text in broken)
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
        said.append(f"{1 - own / beaten[1]:.0%} fewer than {escape(beaten[0])} ({beaten[1]:.2f}).".replace("%", " %"))
    if ahead:
        said.append(f"Still ahead: {escape(ahead[0])} ({ahead[1]:.2f}).")
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
        small = f"<small>{escape(note)}</small>" if note else ""
        bar = f'<span class="bar" style="width:{100 * bits / widest:.2f}%"></span>'
        drawn += f'<tr{own_row}><th scope="row">{escape(name)}{small}</th><td>{bar}</td><td class="number">{bits:.2f}</td></tr>\n'
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

    add("Parameters", run.results.get("num_params"), human)
    add("Tokens seen", run.results.get("tokens_seen", max(run.series("train", "tokens")[1], default=None)), human)
    add("Held-out perplexity", run.results.get("perplexity"), lambda x: f"{x:,.2f}")
    add("Wall time", run.results.get("wall_seconds"), duration)
    add("Tokens per second", usual("tokens_per_second"), lambda x: f"{x:,.0f}")
    add("MFU", usual("mfu"), percent)
    items = "".join(f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)
    return f'<dl class="facts">{items}</dl>\n' if facts else ""


def _loss(run: Run) -> str:
    train, held_out = run.series("train", "loss"), run.series("eval", "loss")
    if not np.isfinite(train[1]).any():
        return _missing(f"metrics.jsonl has {len(run.records)} records, and none with a training loss.")
    marks = [(float(r["step"]), str(r.get("event", "event"))) for r in _happened(run) if r.get("event") in ("resume", "spike")]
    figure, above = loss_figure(train, held_out, run.series("train", "tokens"), marks)
    caption = "Nats per token. Faint: each record; solid: a running mean"
    caption += "; with dots: held-out text." if np.isfinite(held_out[1]).any() else ". Held-out text was not evaluated yet."
    if above:
        caption += f" The first steps, from {above:.2f}, lie above the frame."
    return f'<figure class="wide">{figure}<figcaption>{caption}</figcaption></figure>'


PANELS: tuple[tuple[str, tuple[str, ...], Callable[[float], str], bool], ...] = (
    ("Learning rate", ("lr",), lambda x: f"{x:.2e}", True),
    ("Gradient norm", ("grad_norm",), lambda x: f"{x:.3g}", True),
    ("Tokens per second", ("tokens_per_second",), lambda x: f"{x:,.0f}", True),
    ("Utilisation", ("mfu", "hfu"), lambda x: percent(x), True),
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
        last += f'<span style="color:{colour}">{escape(label + show(float(values[np.isfinite(values)][-1])))}</span> '
    figure = panel_figure(title, lines, from_zero) if lines else ""
    return f"<figure><figcaption><b>{escape(title)}</b><span>{last or 'no finite value'}</span></figcaption>{figure}</figure>"


def _samples(run: Run) -> str:
    """Completions of the last sampled step, earlier ones folded away."""
    by_step: dict[int, dict[str, str]] = {}
    for sample in run.samples:
        by_step.setdefault(int(sample["step"]), {})[str(sample.get("prompt", ""))] = str(sample.get("completion", ""))
    if not by_step:
        return _missing("There are no samples.")

    def draw(step: int) -> str:
        pres = "".join(
            f'<pre class="sample"><span class="prompt">{escape(p)}</span><span class="completion">{escape(c)}</span></pre>\n'
            for p, c in by_step[step].items()
        )
        return f'<p class="muted">At step {step:,}. The prompt is grey, what the model wrote is not.</p>\n{pres}'

    *earlier, last = sorted(by_step)
    folded = "".join(f"<details><summary>Step {step:,}</summary>{draw(step)}</details>\n" for step in reversed(earlier))
    return draw(last) + folded


def _commands(run: Run) -> str:
    go_on = run.results.get("go_on")
    generate = run.results.get("generate")
    rows = [("Train further", go_on), ("Generate", generate)]
    lines = [f"<p>{label}</p>\n<pre>{escape(command)}</pre>\n" for label, command in rows if command]
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
    there = listing(run.path / "checkpoints")
    for folder in sorted({name.split("/")[0] for name in there}):
        name = re.fullmatch(r"(corrupt-)?(\d+)", folder)
        inside = {path.removeprefix(f"{folder}/"): about for path, about in there.items() if path.startswith(f"{folder}/")}
        if name and inside:
            counts = [int(match[1]) for path in inside if (match := re.fullmatch(r"manifest-\d+-of-(\d+)\.json", path))]
            whole = bool(counts) and len(counts) == counts[0]
            state = "damaged, set aside" if name[1] else "complete" if whole else "incomplete"
            size, written = sum(size for size, _ in inside.values()), max(when for _, when in inside.values())
            rows.append((int(name[2]), human(size, BYTE_UNITS), state, _date(written), f"checkpoints/{folder}"))
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
        f"<details><summary>{escape(name)} <small>{len(_flat(values))} values</small></summary>{_table(_flat(values))}</details>\n"
        for name, values in groups
        if values
    )


def _footer(run: Run) -> str:
    times = [float(r["time"]) for r in run.records if _is_number(r.get("time"))]
    when = f" Last record: {_date(max(times))}." if times else ""
    return f"Written by jaxllm {__version__} from the files in {escape(run.path.name or run.path)}.{when}"


# ---------------------------------------------------------------------------------- words and tables


def _missing(message: str) -> str:
    return f'<p class="note">{escape(message)}</p>'


def _name(run: Run) -> str:
    return str(run.config.get("name") or run.path.name)


def _table(rows: Iterable[Sequence[Any]], header: Sequence[str] = (), numbers: Sequence[int] = ()) -> str:
    def cells(row: Sequence[Any], tag: str) -> str:
        return "".join(f"<{tag}{' class=number' if i in numbers else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))

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


# ---------------------------------------------------------------------------------------------- page

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{css}</style>
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
