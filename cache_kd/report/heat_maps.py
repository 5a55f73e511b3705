"""In: maps of a view. Out: a picture of them as heat beside the view, each with its colour bar and unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cache_kd.report.canvas import COLOUR_MAP, drawing, frame_view, new_figure, save, show_view

PANEL = 3.4
UNKNOWN = "#D0D0D0"


@dataclass(frozen=True)
class HeatMap:
    """Values of a level's cells.

    Attributes:
        title: above it. unit: of the values, beside the colour bar. values: (H, W), NaN where nothing is known.
        limits: values of the darkest and the brightest colour; None takes those of the map.
    """

    title: str
    unit: str
    values: np.ndarray
    limits: tuple[float, float] | None = None


def heat_picture(path: Path, title: str, pixels: np.ndarray, rows: Sequence[Sequence[HeatMap]]) -> Path:
    """Draw rows of heat maps, the view itself first in the first row.

    Args:
        pixels: (3, H, W) uint8 RGB.
    """
    columns = 1 + max(len(row) for row in rows)
    with drawing():
        figure = new_figure(PANEL * columns, 0.86 * PANEL * len(rows) + 0.5, title)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for number, row in enumerate(rows):
            for axes, heat in zip(grid[number, 1:], row, strict=False):
                draw_heat(figure, axes, heat, (pixels.shape[1], pixels.shape[2]))
            for axes in grid[number, 1 + len(row) :]:
                axes.set_axis_off()
            if number:
                grid[number, 0].set_axis_off()
        show_view(grid[0, 0], pixels, "the view")
        return save(figure, path)


def draw_heat(figure: Figure, axes: Axes, heat: HeatMap, size: tuple[int, int]) -> None:
    """Draw a heat map over the extent of a view of size (H, W); unknown cells are grey."""
    low, high = heat.limits or (None, None)
    colours = colormaps[COLOUR_MAP].with_extremes(bad=UNKNOWN)
    extent = (0, size[1], size[0], 0)
    image = axes.imshow(heat.values, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")
    frame_view(axes, size, heat.title)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label(heat.unit, fontsize=7)
    bar.ax.tick_params(labelsize=7)
