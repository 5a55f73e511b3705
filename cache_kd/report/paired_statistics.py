"""In: scores of runs. Out: spread, and the difference of two arms with interval, p-value and test of equivalence.

Student's t distribution comes from mpmath's regularised incomplete beta function.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mpmath

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Of the scores of one arm: count, mean, standard deviation (n - 1; None for one), smallest and largest."""

    n: int
    mean: float
    sd: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of one arm minus that of another.

    Attributes:
        test: "paired" over common seeds, "welch" over all runs, or "none" where there are too few.
        seeds: those that are paired. n: pairs, or the smaller arm's runs. each: the difference of every pair.
        interval: of 95 %. p: two-sided, of no difference. p_equivalent: the larger of two one-sided tests' p.
            None where the test is "none".
    """

    mean: float
    test: str
    seeds: tuple[int, ...]
    n: int
    each: tuple[float, ...]
    sd: float | None
    interval: tuple[float, float] | None
    p: float | None
    p_equivalent: float | None


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), sd, min(values), max(values))


def upper_tail(t: float, freedom: float) -> float:
    """Return P(T > t) of Student's t with `freedom` degrees of freedom."""
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    beyond = float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)) / 2
    return beyond if t >= 0 else 1 - beyond


def quantile(level: float, freedom: float) -> float:
    """Return the t > 0 with P(-t < T < t) = `level`, by bisection of the tail."""
    low, high = 0.0, 2.0
    while upper_tail(high, freedom) > (1 - level) / 2:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle, freedom) > (1 - level) / 2 else (low, middle)
    return (low + high) / 2


def difference(one: Mapping[int, float], other: Mapping[int, float], *, margin: float) -> Difference:
    """Return the difference of two arms from their scores by seed: paired where two or more seeds are common.

    Args:
        margin: in the scores' unit; differences inside ± margin count as equivalent.
    """
    common = tuple(sorted(set(one) & set(other)))
    if len(common) > 1:
        each = tuple(one[seed] - other[seed] for seed in common)
        mean, sd = statistics.fmean(each), statistics.stdev(each)
        return _tested("paired", mean, sd, sd / math.sqrt(len(each)), len(each) - 1, common, each, len(each), margin)
    first, second = list(one.values()), list(other.values())
    if len(first) > 1 and len(second) > 1:
        parts = [statistics.variance(values) / len(values) for values in (first, second)]
        # Welch and Satterthwaite: variances need not be equal.
        below = parts[0] ** 2 / (len(first) - 1) + parts[1] ** 2 / (len(second) - 1)
        freedom = sum(parts) ** 2 / below if below else float(len(first) + len(second) - 2)
        mean = statistics.fmean(first) - statistics.fmean(second)
        smaller = min(len(first), len(second))
        return _tested("welch", mean, None, math.sqrt(sum(parts)), freedom, (), (), smaller, margin)
    each = tuple(one[seed] - other[seed] for seed in common)
    mean = each[0] if each else statistics.fmean(first) - statistics.fmean(second)
    return Difference(mean, "none", common, 1, each, None, None, None, None)


def _tested(
    test: str,
    mean: float,
    sd: float | None,
    error: float,
    freedom: float,
    seeds: tuple[int, ...],
    each: tuple[float, ...],
    n: int,
    margin: float,
) -> Difference:
    half = quantile(LEVEL, freedom) * error
    p = 2 * upper_tail(abs(_ratio(mean, error)), freedom)
    equivalent = max(
        upper_tail(_ratio(mean + margin, error), freedom), upper_tail(_ratio(margin - mean, error), freedom)
    )
    return Difference(mean, test, seeds, n, each, sd, (mean - half, mean + half), min(1.0, p), equivalent)


def _ratio(value: float, error: float) -> float:
    """Return value / error; without any spread, what the ratio grows towards."""
    if error:
        return value / error
    return math.copysign(math.inf, value) if value else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number after Holm (1979), in the given order."""
    adjusted = [0.0] * len(p_values)
    reached = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = reached
    return adjusted
