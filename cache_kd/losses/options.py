"""In: an option's value. Out: whether it is allowed, and the sentence that says what is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

Option = float | int | bool | str | tuple[str, ...]


@dataclass(frozen=True)
class Allowed:
    """Values that an option may take: the rule in words and as a test."""

    text: str
    test: Callable[[Option], bool]


def above(low: float) -> Allowed:
    """Finite numbers greater than `low`."""
    return Allowed(f"finite numbers above {low:g}", lambda value: _finite(value) > low)


def at_least(low: float) -> Allowed:
    """Finite numbers not below `low`."""
    return Allowed(f"finite numbers from {low:g}", lambda value: _finite(value) >= low)


def between(low: float, high: float) -> Allowed:
    """Finite numbers from `low` to `high`, both included."""
    return Allowed(f"finite numbers from {low:g} to {high:g}", lambda value: low <= _finite(value) <= high)


def from_to_below(low: float, high: float) -> Allowed:
    """Finite numbers from `low`, included, to `high`, excluded."""
    return Allowed(f"finite numbers from {low:g} to below {high:g}", lambda value: low <= _finite(value) < high)


def whole(low: int, high: int | None = None) -> Allowed:
    """Whole numbers from `low`, up to `high` if given, both included."""
    words = f"whole numbers from {low}" + ("" if high is None else f" to {high}")
    return Allowed(words, lambda value: type(value) is int and low <= value <= (value if high is None else high))


def one_of(*names: str) -> Allowed:
    """These words only."""
    return Allowed(", ".join(names), lambda value: value in names)


LAYER = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*(:[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)?")
LAYERS = Allowed(
    "P3, P4, P5, and layers that were extracted with --taps, as C4 or 6; 8:10 compares the teacher's 8 with the "
    "student's 10",
    lambda value: isinstance(value, tuple) and len({*value}) == len(value) and all(map(LAYER.fullmatch, value)),
)
"""Rule of `layers`, the option of every method on maps."""


def written(value: Option) -> str:
    """Return a value as a spec writes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _finite(value: Option) -> float:
    """Return a finite number as it is, and what fails every comparison for anything else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else math.nan  # type: ignore[arg-type]  # a number, as just tested
