"""Plots for a study's page: SVG files that stand alone and follow the reader's light or dark colours.

Matplotlib is imported inside functions, because that takes a second.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.report_figures import escape
from jaxllm.study.table import estimate
from jaxllm.study.values import Row

type Point = tuple[float, float, float | None]
"""(x, mean, standard error or None)"""

SERIES = ("#3b7dd8", "#d9622b", "#2a9d74", "#b8519b", "#c08a00", "#5aa9c7", "#8a63c9", "#8a8a8a")
"""Colours that show on white and on black; with more series they begin again, with other markers."""
MARKERS = "os^Dv<>P"
INK, MUTED, RULE = "#000001", "#000002", "#000003"
"""Stand-ins that matplotlib draws with, for what follows the reader's colours."""
STYLE = (
    ":root{--ink:#1c1c1e;--muted:#6b6b70;--rule:#d8d8dc}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e8e8ea;--muted:#9a9aa0;--rule:#3a3a3e}}"
)


def points(rows: Sequence[Row], x: Callable[[Row], float | None], metric: str) -> list[Point]:
    """Means and standard errors of a metric over the rows that have the same x, by rising x; rows without either are left out.

    >>> rows = [{"lr": 1.0, "metrics": {"loss": value}} for value in (2.0, 4.0)]
    >>> points(rows, lambda row: row["lr"], "loss")
    [(1.0, 3.0, 1.0)]
    """
    groups: dict[float, list[float]] = {}
    for row in rows:
        at, value = x(row), row.get("metrics", {}).get(metric)
        if at is not None and value is not None:
            groups.setdefault(at, []).append(value)
    found = [(at, estimate(values)) for at, values in sorted(groups.items())]
    return [(at, value.mean, value.error) for at, value in found]


def over_rates(metric: str, heading: str = "") -> Callable[[Sequence[Row]], str]:
    """The drawing of a `Figure`: a metric over the learning rates that each arm's search has tried."""

    def draw(rows: Sequence[Row]) -> str:
        arms = dict.fromkeys(row["arm"] for row in rows if row["kind"] == "search")
        series = {arm: points([r for r in rows if r["arm"] == arm and r["kind"] == "search"], lambda r: r["lr"], metric) for arm in arms}
        return lines(f"{heading or metric} over the learning rate", "learning rate", heading or metric, series, log_x=True)

    return draw


def lines(label: str, x_name: str, y_name: str, series: Mapping[str, Sequence[Point]], *, log_x: bool = False, log_y: bool = False) -> str:
    """Named series of points with error bars, joined by lines; returns SVG.

    Args:
      label: what the plot shows, for those who cannot see it.
      log_x: whether the axis is logarithmic.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelcolor=MUTED, labelsize=9)
    if log_x:
        axes.set_xscale("log")
        if len(tried := sorted({point[0] for values in series.values() for point in values})) <= 10:
            axes.set_xticks(tried, [f"{x:g}" for x in tried])
            axes.set_xticks([], minor=True)
    if log_y:
        axes.set_yscale("log")
    for i, (name, values) in enumerate(series.items()):
        x, y, bars = [p[0] for p in values], [p[1] for p in values], [p[2] or 0.0 for p in values]
        marker = MARKERS[(i // len(SERIES) + i) % len(MARKERS)]
        axes.errorbar(
            x, y, yerr=bars if any(bars) else None, color=SERIES[i % len(SERIES)], marker=marker, markersize=4, linewidth=1.5, label=name
        )
    axes.set_xlabel(x_name, color=MUTED, fontsize=9)
    axes.set_ylabel(y_name, color=MUTED, fontsize=9)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, label)


def _svg(figure: Any, label: str) -> str:
    """The figure as an SVG file: text stays text, colours follow the reader's, nothing in it names the day or the machine."""
    import matplotlib as mpl

    buffer = io.StringIO()
    salt = f"{zlib.crc32(label.encode()):08x}"
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = re.sub(r"<svg[^>]*>", f'<svg {names} {view[0]} role="img" aria-label="{escape(label)}">\n<style>{STYLE}</style>', svg, count=1)
    for stand_in, name in ((INK, "ink"), (MUTED, "muted"), (RULE, "rule")):
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg
