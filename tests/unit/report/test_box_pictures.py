"""Pictures show boxes where they are, in each source's colour and dashes, and give the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from cache_kd.errors import CacheKDError
from cache_kd.report.box_pictures import MOST_CELLS, Cell, box_picture, sheet
from cache_kd.report.canvas import INKS, PAPER, TEXT, BoxLayer, shown

SIDE = 64
BOX = np.array([[16.0, 20.0, 48.0, 56.0]])
BLACK = np.zeros((3, SIDE, SIDE), np.uint8)


def inked(picture: np.ndarray, source: str, box: np.ndarray) -> dict[str, float]:
    """Return the share of each side of a box that has a source's colour, on the one black view of a picture."""
    dark = (picture[..., :3] < 0.02).all(axis=2)
    rows, columns = np.flatnonzero(dark.mean(axis=1) > 0.3), np.flatnonzero(dark.mean(axis=0) > 0.3)
    top, left = rows[0], columns[0]
    scale = (rows[-1] + 1 - top) / SIDE
    near = (np.abs(picture[..., :3] - to_rgb(INKS[source].colour)) < 0.12).all(axis=2)
    x0, y0, x1, y1 = (box * scale).round().astype(int) + np.array([left, top, left, top])
    line = {
        "top": near[y0 - 2 : y0 + 3, x0 + 4 : x1 - 3].any(axis=0),
        "bottom": near[y1 - 2 : y1 + 3, x0 + 4 : x1 - 3].any(axis=0),
        "left": near[y0 + 4 : y1 - 3, x0 - 2 : x0 + 3].any(axis=1),
        "right": near[y0 + 4 : y1 - 3, x1 - 2 : x1 + 3].any(axis=1),
        "inside": near[y0 + 5 : y1 - 4, x0 + 5 : x1 - 4].any(axis=0),
    }
    return {name: float(found.mean()) for name, found in line.items()}


@pytest.mark.parametrize(("source", "least", "most"), [("labels", 0.95, 1.0), ("teacher", 0.4, 0.95)])
def test_a_box_is_drawn_where_it_is(tmp_path: Path, source: str, least: float, most: float) -> None:
    """A solid line is whole, a dashed one has gaps: who cannot tell the colours tells the lines."""
    path = sheet(tmp_path / "a.png", "title", [Cell("one", BLACK, (BoxLayer(source, BOX),))])
    found = inked(imread(path), source, BOX[0])
    assert found.pop("inside") == 0
    assert all(least <= share <= most for share in found.values()), found
    assert inked(imread(path), "student", BOX[0])["top"] == 0


def test_one_view_has_a_panel_a_source(tmp_path: Path) -> None:
    layers = [BoxLayer("labels", BOX, ("a",)), BoxLayer("teacher", BOX + 3, ("a 0.90",)), BoxLayer("student", BOX)]
    widths = []
    for count in (1, 2, 3):
        path = box_picture(tmp_path / f"{count}.png", "title", BLACK, layers[:count], ["x"] * count)
        picture = imread(path)
        widths.append(picture.shape[1])
        colours = [
            (np.abs(picture[..., :3] - to_rgb(ink.colour)) < 0.05).all(axis=2).sum() > 50 for ink in INKS.values()
        ]
        assert colours == [place < count for place in range(3)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=2) and widths[2] == pytest.approx(3 * widths[0], abs=2)


def test_pictures_do_not_depend_on_the_clock_or_on_settings(tmp_path: Path) -> None:
    cells = [Cell(f"{n}", BLACK, (BoxLayer("labels", BOX), BoxLayer("teacher", BOX))) for n in range(3)]
    first = sheet(tmp_path / "a.png", "title", cells).read_bytes()
    with matplotlib.rc_context({"text.color": "white", "axes.facecolor": "black", "legend.fontsize": 20}):
        second = sheet(tmp_path / "b.png", "title", cells).read_bytes()
        assert matplotlib.rcParams["text.color"] == "white"  # what the user set stays
    assert first == second
    assert b"Software" not in first and b"tIME" not in first and b"Creation" not in first


def test_text_reads_on_any_page(tmp_path: Path) -> None:
    """The picture brings its own paper, opaque, with a frame, and the text's contrast on it is that of print."""
    picture = imread(sheet(tmp_path / "a.png", "title", [Cell("one", BLACK, ())]))
    assert picture.shape[2] == 3 or (picture[..., 3] == 1).all()
    assert np.abs(picture[8, 8, :3] - to_rgb(PAPER)).max() < 0.01
    assert picture[0, :, :3].max() < 0.75  # the frame

    def light(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    assert (light(PAPER) + 0.05) / (light(TEXT) + 0.05) > 7
    assert all((light("white") + 0.05) / (light(ink.colour) + 0.05) > 3 for ink in INKS.values())


def test_names_of_any_kind_are_drawn(tmp_path: Path) -> None:
    odd = "a$b_$^\x07" + "\udc80" + "漢" * 80
    assert shown(odd).isprintable() and len(shown(odd)) <= 60
    layer = BoxLayer("labels", BOX, (odd,))
    box_picture(tmp_path / "a.png", odd, BLACK, [layer], [shown(odd)])
    sheet(tmp_path / "b.png", odd, [Cell(odd, BLACK, (layer,))])


def test_a_sheet_is_bounded(tmp_path: Path) -> None:
    cell = Cell("one", BLACK, ())
    most = imread(sheet(tmp_path / "a.png", "t", [cell] * MOST_CELLS)).shape
    assert imread(sheet(tmp_path / "b.png", "t", [cell] * (MOST_CELLS + 50))).shape == most


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises((CacheKDError, OSError), match="missing"):
        sheet(tmp_path / "missing" / "a.png", "title", [Cell("one", BLACK, ())])
