"""The plots of the report: matplotlib drawings as inline SVG that takes its colours from the page.

`loss_figure` and `panel_figure` draw series of numbers and know nothing of a run directory. Matplotlib is imported inside
functions, because that takes a second.
"""

from __future__ import annotations

import html
import io
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

type Series = tuple[np.ndarray, np.ndarray]
"""(steps, values) of one metric, steps rising; nan where a value was not finite."""

COLOURS = {
    "#000001": "var(--ink)",
    "#000002": "var(--muted)",
    "#000003": "var(--rule)",
    "#000004": "var(--train)",
    "#000005": "var(--held)",
}
"""Stand-ins that matplotlib draws with, and the page's own colours, so that one SVG serves light and dark."""
INK, MUTED, RULE, TRAIN, HELD = COLOURS


def loss_figure(train: Series, held_out: Series, tokens: Series, marks: Sequence[tuple[float, str]]) -> tuple[str, float | None]:
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
    top.set_xticks(np.interp(ticks, y, x), [human(t) for t in ticks])
    _unit(axes, "tokens", 1)
    top.tick_params(length=0, labelcolor=MUTED)
    for side in top.spines.values():
        side.set_visible(False)


def _unit(axes: Any, name: str, height: int) -> None:
    """The name of a horizontal axis in the row of its tick labels, right of the last one."""
    at = (26, 8 if height else -8)
    axes.annotate(name, (1, height), at, xycoords="axes fraction", textcoords="offset points", va="center", color=MUTED)


def panel_figure(title: str, lines: Sequence[tuple[str, Series]], from_zero: bool) -> str:
    """Named series over steps in one small frame, whose vertical axis starts at 0 where `from_zero` is set; returns SVG."""
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
        axes.yaxis.set_major_formatter(lambda x, _: percent(x, 0))
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
    svg = re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-label="{escape(label)}">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg


# --------------------------------------------------------------------------------------------- words


CONTROL = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {127: 0x2421}
"""Control characters, which a model of bytes may write and HTML may not hold, to the pictures of them that Unicode has."""


def escape(value: Any) -> str:
    """A value as text that HTML shows as it is."""
    return html.escape(str(value).translate(CONTROL), quote=True)


def percent(ratio: float, digits: int = 1) -> str:
    """0.413 is 41.3 %."""
    return f"{100 * ratio:.{digits}f} %"


def human(number: float, units: Sequence[tuple[float, str]] = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))) -> str:
    """Three digits and a unit: 12,288,000 is 12.3 M."""
    return next((f"{number / size:.3g} {unit}" for size, unit in units if number >= size), f"{number:.3g}")
