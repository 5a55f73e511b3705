"""In: an option's value. Out: whether it is allowed, and the sentence that says what is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Option = float | int | bool | str


@dataclass(frozen=True)
class Allowed:
    """Values that an option may take: the rule in words and as a test."""

    text: str
    test: Callable[[Option], bool]


def above(low: float) -> Allowed:
    """Finite numbers greater than `low`."""
    return Allowed(f"finite numbers above {low:g}", lambda value: _finite(value) and float(value) > low)


def at_least(low: float) -> Allowed:
    """Finite numbers not below `low`."""
    return Allowed(f"finite numbers from {low:g}", lambda value: _finite(value) and float(value) >= low)


def one_of(*names: str) -> Allowed:
    """These words only."""
    return Allowed(", ".join(names), lambda value: value in names)


def _finite(value: Option) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
