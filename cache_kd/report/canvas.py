"""In: parts of a picture. Out: a file that looks the same on every machine, on light pages and on dark ones.

Figures are matplotlib objects on the Agg canvas: no window, no pyplot, no random number, nothing outlives the call.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cache_kd.cache.files import write_atomic

PAPER, TEXT, FRAME = "#FBFBFB", "#1A1A1A", "#8A8A8A"
"""An own background with a frame: text keeps its contrast whatever the page behind has for a colour."""
COLOUR_MAP = "cividis"
"""Light and dark differ for every kind of colour vision, in print too."""
DOTS = 110
MARGIN = 0.06
LONGEST = 60


@dataclass(frozen=True)
class Ink:
    """How the boxes of a source are drawn: a colour and, for who cannot tell colours, dashes (none: a solid line)."""

    colour: str
    dashes: tuple[float, ...] | None = None

    @property
    def style(self) -> tuple[float, tuple[float, ...]] | Literal["-"]:
        return (0.0, self.dashes) if self.dashes else "-"


INKS = {
    "labels": Ink("#D55E00"),
    "teacher": Ink("#0072B2", (4, 1.6)),
    "student": Ink("#007D5C", (1.2, 1.2)),
}
"""Vermilion, blue and (darkened) green of Okabe and Ito."""


@dataclass(frozen=True)
class BoxLayer:
    """Boxes of one source.

    Attributes:
        source: of `INKS`. boxes: (n, 4) xyxy in pixels of the view. texts: what stands at each box; may be empty.
    """

    source: str
    boxes: np.ndarray
    texts: tuple[str, ...] = ()


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with matplotlib's own defaults inside this scope, whatever the user's settings are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": FRAME})
        matplotlib.rcParams.update({"xtick.color": TEXT, "ytick.color": TEXT, "font.size": 8, "axes.titlesize": 9})
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # names in scripts that the font lacks
        yield


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return a figure of a size in inches with its title."""
    figure = Figure(figsize=(width, height), dpi=DOTS, facecolor=PAPER, edgecolor=FRAME)
    figure.set_layout_engine("constrained", w_pad=MARGIN, h_pad=MARGIN)
    figure.patch.set_linewidth(2)
    figure.suptitle(shown(title, 200), fontsize=10, fontweight="bold", parse_math=False)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as the kind of file that `path` names; raises `CacheKDError` when the disk refuses."""
    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    # Neither date nor version: the same cache gives the same bytes.
    metadata = {"Software": None} if kind == "png" else None
    figure.savefig(buffer, format=kind, facecolor=figure.get_facecolor(), edgecolor=FRAME, metadata=metadata)
    write_atomic(path, buffer.getvalue())
    return path


def shown(text: str, longest: int = LONGEST) -> str:
    """Return a name fit to be drawn: no control characters, not too long."""
    printable = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    return printable if len(printable) <= longest else f"{printable[: longest - 1]}…"


def show_view(axes: Axes, pixels: np.ndarray, title: str, *, ticks: int = 5) -> None:
    """Draw pixels (3, H, W) uint8 RGB with axes in pixels of the view."""
    height, width = pixels.shape[1:]
    axes.imshow(pixels.transpose(1, 2, 0), extent=(0, width, height, 0))
    frame_view(axes, (height, width), title, ticks=ticks)


def frame_view(axes: Axes, size: tuple[int, int], title: str, *, ticks: int = 5) -> None:
    """Give axes the ticks and labels of a view of size (H, W)."""
    height, width = size
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks(np.linspace(0, width, ticks))
    axes.set_yticks(np.linspace(0, height, ticks))
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("x in pixels of the view", fontsize=7)
    axes.set_ylabel("y in pixels of the view", fontsize=7)
    axes.set_title(title, parse_math=False)


def draw_boxes(axes: Axes, layers: Sequence[BoxLayer], *, width: float = 1.3) -> None:
    """Draw the boxes of some layers and their texts.

    A white casing sets them off from any image. Where boxes of two layers agree, one shows in the gaps of the other.
    """
    outlines = {layer.source: list(layer.boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3], [0, 1]]]) for layer in layers}
    for lines in outlines.values():
        casing = LineCollection(lines, colors="white", linewidths=width + 1.4, alpha=0.75)
        axes.add_collection(casing, autolim=False)
    for source, lines in outlines.items():
        ink = INKS[source]
        axes.add_collection(
            LineCollection(lines, colors=ink.colour, linewidths=width, linestyles=[ink.style]), autolim=False
        )
    for layer in layers:
        for box, text in zip(layer.boxes, layer.texts, strict=False):
            _write(axes, box, text, INKS[layer.source])


def _write(axes: Axes, box: np.ndarray, text: str, ink: Ink) -> None:
    """Write a box's text on its upper edge, inside the view where the box begins outside."""
    x, y = max(float(box[0]), 0.0), max(float(box[1]), 0.0)
    axes.text(
        x,
        y,
        shown(text, 24),
        color="white",
        fontsize=5.5,
        verticalalignment="top",
        clip_on=True,
        parse_math=False,
        bbox={"facecolor": ink.colour, "edgecolor": "white", "linewidth": 0.4, "pad": 0.8, "alpha": 0.9},
    )


def legend_of(figure: Figure, sources: Sequence[str]) -> None:
    """Say below the figure whose boxes are whose."""
    handles = [Line2D([], [], color=INKS[name].colour, linestyle=INKS[name].style, linewidth=2) for name in sources]
    if handles:
        figure.legend(handles, list(sources), loc="outside lower center", ncols=len(handles), frameon=False)
