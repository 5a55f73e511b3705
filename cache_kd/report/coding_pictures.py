"""In: a view's targets as stored, on request as the teacher says them. Out: pictures of what the codec does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from cache_kd.report.canvas import FRAME, INKS, drawing, new_figure, save
from cache_kd.report.heat_maps import HeatMap, draw_heat

PANEL = 3.4
BINS = 101
_BARS = INKS["teacher"].colour
_LIMIT = INKS["labels"].colour


@dataclass(frozen=True)
class CodedLevel:
    """A level's maps.

    Attributes:
        name: P3. stored: (F, H, W) as read back. bound: largest |error| declared, broadcastable against them.
        live: (F, H, W), what the teacher says; None where it was not asked.
    """

    name: str
    stored: np.ndarray
    bound: np.ndarray
    live: np.ndarray | None = None

    @property
    def spread(self) -> float:
        """Standard deviation of the level's stored values."""
        return float(self.stored.std(dtype=np.float64))

    @property
    def relative_bound(self) -> float:
        """The bound, averaged over channels, in standard deviations of the level."""
        return float(self.bound.mean()) / max(self.spread, 1e-30)

    def errors(self) -> np.ndarray:
        """Return stored minus live in units of the bound."""
        assert self.live is not None
        scaled: np.ndarray = (self.stored - self.live) / self.bound
        return scaled


@dataclass(frozen=True)
class CodedLogits:
    """What became of the logits: anchors sent and all anchors of each level; errors of the sent, where they are known.

    Attributes:
        sent, anchors: by level. errors: name → (n,) in `unit`, one entry each for classes and boxes.
    """

    names: tuple[str, ...]
    sent: tuple[int, ...]
    anchors: tuple[int, ...]
    errors: dict[str, np.ndarray]
    unit: str


def declared_picture(
    path: Path, title: str, levels: Sequence[CodedLevel], logits: CodedLogits | None, says: Sequence[str]
) -> Path:
    """Draw what a codec promises: the values that are left of each level, its bound, the anchors that were sent.

    Args:
        says: lines about the codec, the last panel.
    """
    with drawing():
        columns = max(len(levels), 3)
        rows = 2 if levels else 1
        figure = new_figure(PANEL * columns, PANEL * 0.9 * rows + 0.6, title)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, level in zip(grid[0], levels, strict=False):
            axes.set_axis_on()
            _values_left(axes, level)
        last = grid[-1]
        if levels:
            last[0].set_axis_on()
            _bounds(last[0], levels)
        if logits is not None:
            last[1].set_axis_on()
            _anchors_sent(last[1], logits)
        _words(last[2], says)
        return save(figure, path)


def difference_picture(
    path: Path,
    title: str,
    levels: Sequence[CodedLevel],
    logits: CodedLogits | None,
    says: Sequence[str],
    size: tuple[int, int],
) -> Path:
    """Draw what a codec changed: each level as the teacher says it, as it is stored, and the error beside its bound.

    Args:
        size: (H, W) of the view in pixels.
    """
    with drawing():
        rows = len(levels) + 1
        figure = new_figure(PANEL * 4, PANEL * 0.86 * rows + 0.5, title)
        grid = figure.subplots(rows, 4, squeeze=False)
        for row, level in zip(grid, levels, strict=False):
            assert level.live is not None
            before, after = (np.abs(maps).mean(axis=0) for maps in (level.live, level.stored))
            limits = (float(before.min()), float(before.max()))
            error = level.errors()
            for axes, heat in zip(
                row,
                (
                    HeatMap(f"{level.name}: the teacher says", "mean |activation|", before, limits),
                    HeatMap(f"{level.name}: the cache holds", "mean |activation|", after, limits),
                    HeatMap(
                        f"{level.name}: largest |error| of a cell's channels",
                        "declared bounds",
                        np.abs(error).max(axis=0),
                        (0.0, 1.0),
                    ),
                ),
                strict=False,
            ):
                draw_heat(figure, axes, heat, size)
            _errors(row[3], error.ravel(), f"{level.name}: bound ±{level.bound.mean():.3g}", "declared bounds", 1.0)
        last = grid[-1]
        for axes in last:
            axes.set_axis_off()
        if logits is not None:
            last[0].set_axis_on()
            _anchors_sent(last[0], logits)
            for axes, (name, errors) in zip(last[1:3], logits.errors.items(), strict=False):
                axes.set_axis_on()
                _errors(axes, errors, f"{name} of sent anchors", logits.unit, 0.5 if "step" in logits.unit else None)
        _words(last[3], [*says, "", "dashed lines: the largest error", "that the codec declares"])
        return save(figure, path)


def _values_left(axes: Axes, level: CodedLevel) -> None:
    """Draw how often values occur as they are stored, and the width of the bound."""
    axes.hist(level.stored.ravel(), bins=BINS, color=_BARS, histtype="stepfilled")
    # A ruler, in the middle and near the top: how far apart a value and what is stored of it may be.
    middle = float(level.stored.min() + level.stored.max()) / 2
    place = axes.get_xaxis_transform()
    axes.errorbar([middle], [0.9], xerr=[level.bound.mean()], transform=place, color=_LIMIT, capsize=4)
    axes.text(middle, 0.93, "± bound", transform=place, ha="center", fontsize=7, color=_LIMIT)
    axes.set_yscale("log")
    axes.set_title(f"{level.name}: values as stored\nsd {level.spread:.3g}, bound ±{level.bound.mean():.3g}")
    axes.set_xlabel("activation")
    axes.set_ylabel("cells and channels")
    _quiet(axes)


def _bounds(axes: Axes, levels: Sequence[CodedLevel]) -> None:
    names = [level.name for level in levels]
    shares = [level.relative_bound for level in levels]
    bars = axes.barh(names[::-1], shares[::-1], color=_BARS)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set_xlim(0, max(shares) * 1.25 or 1)
    axes.set_title("largest error that is allowed")
    axes.set_xlabel("standard deviations of the level")
    axes.set_ylabel("level")
    _quiet(axes)


def _anchors_sent(axes: Axes, logits: CodedLogits) -> None:
    shares = [100 * sent / count for sent, count in zip(logits.sent, logits.anchors, strict=True)]
    bars = axes.barh(logits.names[::-1], shares[::-1], color=_BARS)
    texts = [f"{sent} of {count}" for sent, count in zip(logits.sent, logits.anchors, strict=True)]
    axes.bar_label(bars, texts[::-1], padding=3)
    axes.set_xlim(0, max(*shares, 1) * 1.45)
    axes.set_title("anchors whose logits are stored")
    axes.set_xlabel("per cent of the level's anchors")
    axes.set_ylabel("level")
    _quiet(axes)


def _errors(axes: Axes, errors: np.ndarray, title: str, unit: str, limit: float | None) -> None:
    """Draw a histogram of errors with the declared limit on both sides."""
    widest = max(limit or 0.0, float(np.abs(errors).max(initial=0.0)), 1e-12) * 1.08
    axes.hist(errors, bins=BINS, range=(-widest, widest), color=_BARS, histtype="stepfilled")
    for place in () if limit is None else (-limit, limit):
        axes.axvline(place, color=_LIMIT, linestyle="--", linewidth=1.2)
    rms = float(np.sqrt(np.square(errors, dtype=np.float64).mean())) if errors.size else 0.0
    largest = float(np.abs(errors).max(initial=0.0))
    axes.set_title(f"{title}\nrms {rms:.2g}, largest {largest:.2g}")
    axes.set_xlabel(f"error in {unit}")
    axes.set_ylabel("values")
    _quiet(axes)


def _words(axes: Axes, says: Sequence[str]) -> None:
    axes.set_axis_off()
    axes.text(0.02, 0.98, "\n".join(says), transform=axes.transAxes, va="top", parse_math=False, linespacing=1.5)


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=FRAME, alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
