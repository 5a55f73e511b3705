"""In: numbers. Out: them as text, the same on the page and in Markdown."""

from __future__ import annotations

from cache_kd.report.blocks import NOTHING
from cache_kd.report.paired_statistics import Spread
from cache_kd.report.verdict import p_text, signed

SIZES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def points(value: float | None) -> str:
    """Return points without a sign."""
    return NOTHING if value is None else f"{value:.2f}"


def mean_and_sd(found: Spread) -> str:
    """Return mean and standard deviation of points."""
    return f"{found.mean:.2f} (one seed)" if found.sd is None else f"{found.mean:.2f} ± {found.sd:.2f}"


def change(value: float | None) -> str:
    """Return a difference in points, signed."""
    return NOTHING if value is None else signed(value)


def interval(ends: tuple[float, float] | None) -> str:
    """Return an interval of points."""
    return NOTHING if ends is None else f"{signed(ends[0])} to {signed(ends[1])}"


def probability(p: float | None) -> str:
    """Return a p-value."""
    return NOTHING if p is None else p_text(p)


def seconds(value: float | None) -> str:
    """Return seconds, with tenths where they matter."""
    return NOTHING if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def size(count: float | None) -> str:
    """Return bytes with a fitting decimal unit."""
    if count is None:
        return NOTHING
    return next((f"{count / size:.1f} {unit}" for unit, size in SIZES if count >= size), f"{count:.0f} B")


def count(value: float | None) -> str:
    """Return a number of things."""
    return NOTHING if value is None else f"{value:.0f}"


def figure(value: float | None) -> str:
    """Return a number with four digits that count."""
    return NOTHING if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    """Return a share of one as per cent."""
    return NOTHING if share is None else f"{100 * share:.1f} %"


def seeds(values: list[int]) -> str:
    """Return how many seeds and which, in rising order: a list, or a range where three or more follow each other."""
    if len(values) > 2 and values == list(range(values[0], values[0] + len(values))):
        return f"{len(values)} ({values[0]} to {values[-1]})"
    return f"{len(values)} ({', '.join(str(value) for value in values)})"
