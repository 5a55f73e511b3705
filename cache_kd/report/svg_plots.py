"""In: series of numbers. Out: plots as SVG to stand inside an HTML page: text as text, colours from the page's style.

The same numbers give the same bytes: no date, no random id. Lines differ by colour (Okabe and Ito's, which colour-blind
readers tell apart), by marker and by dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cache_kd.report.canvas import drawing, shown

# Drawn in colours that stand for others: the page's style sheet says which, for light and for dark.
INK, GRID = "#010101", "#8a8a8a"
ARM_COLOURS = (INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)), (0, (8, 2)))
STYLES = {INK: "currentColor", GRID: "var(--grid)"} | {
    colour: f"var(--arm{at})" for at, colour in enumerate(ARM_COLOURS) if at
}
_SIZE = (4.6, 2.9)
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Line:
    """A line of a plot; `style` is a place in the palette, 0 the page's own text colour. `low` and `high` may be ()."""

    label: str
    style: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Interval:
    """A row of a plot of differences: mean, 95 % interval or None, and the difference of every seed."""

    label: str
    style: int
    mean: float
    interval: tuple[float, float] | None
    each: tuple[float, ...]


def line_plot(
    name: str, lines: Sequence[Line], *, x: str, y: str, log: bool = False, limits: Sequence[float] = ()
) -> str:
    """Return the SVG of lines with bands from smallest to largest; `name` is unique on the page, `limits` are drawn."""
    with drawing():
        figure, axes = _figure(_SIZE)
        for line in lines:
            colour = ARM_COLOURS[line.style]
            every = max(1, len(line.x) // 8)
            axes.plot(
                line.x, line.y, color=colour, linestyle=DASHES[line.style], linewidth=1.5,
                marker=MARKERS[line.style], markersize=4, markevery=(every - 1, every),
            )  # fmt: skip
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        for limit in limits:
            axes.axhline(limit, color=GRID, linewidth=1, linestyle=(0, (2, 2)))
        if log and all(value > 0 for line in lines for value in line.y):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # epochs and seconds
        _label(axes, x, y)
        return _svg(figure, name)


def interval_plot(name: str, rows: Sequence[Interval], *, margin: float, x: str) -> str:
    """Return the SVG of differences with their intervals around zero and the band of equivalence."""
    with drawing():
        figure, axes = _figure((_SIZE[0], 1.0 + 0.34 * len(rows)))
        axes.axvspan(-margin, margin, color=GRID, alpha=0.18, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1)
        for at, row in enumerate(rows):
            colour = ARM_COLOURS[row.style]
            if row.interval is not None:
                axes.plot(row.interval, (at, at), color=colour, linewidth=2, solid_capstyle="butt")
                axes.plot(row.interval, (at, at), color=colour, linestyle="none", marker="|", markersize=8)
            axes.plot(row.each, [at + 0.26] * len(row.each), color=colour, linestyle="none", marker=".", markersize=3.5)
            axes.plot([row.mean], [at], color=colour, linestyle="none", marker=MARKERS[row.style], markersize=6)
        axes.set_yticks(range(len(rows)), [shown(row.label, 28) for row in rows], parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        _label(axes, x, "")
        return _svg(figure, name)


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cache-kd", "font.size": 9})
    matplotlib.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID})
    matplotlib.rcParams.update({"xtick.color": INK, "ytick.color": INK})
    figure = Figure(figsize=size, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(y, parse_math=False)
    axes.tick_params(length=3)


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element without links to outside, its ids its own, its colours the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    # Its rules would hold for the whole page, which says them itself; HTML needs no names of vocabularies.
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = (
        re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    )
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", text)
    for colour, style in STYLES.items():
        text = text.replace(colour, style)
    return text.replace("xlink:href", "href").replace("<svg ", '<svg aria-hidden="true" ', 1)


def swatch(style: int) -> str:
    """Return a short line with its marker, as a legend shows it, for the page to draw."""
    dash = DASHES[style]
    pattern = "" if isinstance(dash, str) else f' stroke-dasharray="{" ".join(f"{1.6 * part:g}" for part in dash[1])}"'
    colour = STYLES[ARM_COLOURS[style]]
    marks = (
        '<circle cx="18" cy="6" r="3.6"/>',
        '<rect x="14.6" y="2.6" width="6.8" height="6.8"/>',
        '<path d="M18 1.6 22 9.4H14Z"/>',
        '<path d="M18 1.4 22.6 6 18 10.6 13.4 6Z"/>',
        '<path d="M18 10.4 22 2.6H14Z"/>',
        '<path d="M14 3 15 2 18 5 21 2 22 3 19 6 22 9 21 10 18 7 15 10 14 9 17 6Z"/>',
    )
    return (
        f'<svg class="swatch" viewBox="0 0 36 12" aria-hidden="true" style="color:{colour}">'
        f'<path d="M0 6H36" fill="none" stroke="currentColor" stroke-width="2"{pattern}/>'
        f'<g fill="currentColor">{marks[style]}</g></svg>'
    )
