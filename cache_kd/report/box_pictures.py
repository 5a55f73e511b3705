"""In: views and boxes. Out: a picture of one view, a panel a source; a sheet of many views with everything on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_kd.report.canvas import BoxLayer, draw_boxes, drawing, legend_of, new_figure, save, show_view, shown

PANEL = 5.6
CELL = 2.5
MOST_CELLS = 100


@dataclass(frozen=True)
class Cell:
    """One view on a sheet: what stands above it, pixels (3, H, W) uint8 RGB, boxes."""

    title: str
    pixels: np.ndarray
    layers: tuple[BoxLayer, ...]


def box_picture(
    path: Path, title: str, pixels: np.ndarray, layers: Sequence[BoxLayer], captions: Sequence[str]
) -> Path:
    """Draw a view once a source: its boxes with their texts, over thin outlines of the labels.

    Args:
        pixels: (3, H, W) uint8 RGB. layers: the labels first. captions: what stands above each panel.
    """
    with drawing():
        figure = new_figure(PANEL * len(layers), PANEL + 0.6, title)
        for axes, layer, caption in zip(
            figure.subplots(1, len(layers), squeeze=False)[0], layers, captions, strict=True
        ):
            show_view(axes, pixels, caption)
            if layer.source != "labels":
                draw_boxes(axes, [BoxLayer("labels", layers[0].boxes)], width=0.7)
            draw_boxes(axes, [layer])
        legend_of(figure, [layer.source for layer in layers])
        return save(figure, path)


def sheet(path: Path, title: str, cells: Sequence[Cell], *, columns: int | None = None) -> Path:
    """Draw views side by side, each with all of its boxes, at most `MOST_CELLS`; axes are in pixels of the view."""
    cells = cells[:MOST_CELLS]
    columns = min(columns or math.ceil(math.sqrt(len(cells))), len(cells))
    rows = -(-len(cells) // columns)
    with drawing():
        figure = new_figure(CELL * columns, (CELL + 0.2) * rows + 0.7, title)
        grid = figure.subplots(rows, columns, squeeze=False)
        for number, (axes, cell) in enumerate(zip(grid.flat, cells, strict=False)):
            show_view(axes, cell.pixels, shown(cell.title, 48), ticks=3)
            axes.title.set_fontsize(7)
            draw_boxes(axes, cell.layers, width=0.9)
            if number % columns:
                axes.set_ylabel("")
            if number < len(cells) - columns:
                axes.set_xlabel("")
        for axes in grid.flat[len(cells) :]:
            axes.set_axis_off()
        legend_of(figure, list(dict.fromkeys(layer.source for cell in cells for layer in cell.layers)))
        return save(figure, path)
