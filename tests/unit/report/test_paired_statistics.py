"""Intervals, p-values, equivalence and Holm's correction are those of tables and of worked examples."""

from __future__ import annotations

import math

import pytest

from cache_kd.report.paired_statistics import difference, holm, quantile, spread, upper_tail

# Quantiles of Student's t from printed tables, for two-sided 90, 95 and 99 %.
TABLE = [
    (1, 6.3138, 12.7062, 63.6567),
    (2, 2.9200, 4.3027, 9.9248),
    (4, 2.1318, 2.7764, 4.6041),
    (30, 1.6973, 2.0423, 2.7500),
]


@pytest.mark.parametrize(("freedom", "ninety", "ninety_five", "ninety_nine"), TABLE)
def test_quantiles_are_the_tables(freedom: int, ninety: float, ninety_five: float, ninety_nine: float) -> None:
    for level, expected in ((0.90, ninety), (0.95, ninety_five), (0.99, ninety_nine)):
        assert quantile(level, freedom) == pytest.approx(expected, abs=6e-5)
        assert upper_tail(expected, freedom) == pytest.approx((1 - level) / 2, rel=1e-4)
        assert upper_tail(-expected, freedom) == pytest.approx((1 + level) / 2, rel=1e-4)


def test_one_degree_of_freedom_is_cauchy() -> None:
    for t in (-3.0, 0.0, 0.5, 8.0):
        assert upper_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-12)


def test_two_degrees_of_freedom_are_the_closed_form() -> None:
    for t in (-3.0, 0.0, 0.5, 8.0):
        assert upper_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_spread_is_by_hand() -> None:
    found = spread([36.0, 37.0, 39.0])
    assert (found.n, found.mean, found.low, found.high) == (3, pytest.approx(112 / 3), 36.0, 39.0)
    assert found.sd == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert spread([36.0]).sd is None


def test_paired_difference_is_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1/√3, t = 3.4641 with 2 degrees of freedom.
    found = difference({0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0}, margin=1.0)
    half = 4.302653 / math.sqrt(3)
    assert (found.test, found.n, found.seeds, found.each) == ("paired", 3, (0, 1, 2), (1.0, 2.0, 3.0))
    assert (found.mean, found.sd) == (2.0, 1.0)
    assert found.interval == (pytest.approx(2 - half, abs=1e-5), pytest.approx(2 + half, abs=1e-5))
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    # One-sided against the upper margin: (1 - 2)·√3 = -1.7321.
    t = -math.sqrt(3)
    assert found.p_equivalent == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_equivalence_agrees_with_its_ninety_per_cent_interval() -> None:
    for shift in (0.0, 0.5, 0.8, 0.95, 1.2, -0.8, -0.95):
        one = {seed: 30 + shift + noise for seed, noise in enumerate((-0.1, 0.0, 0.1, 0.05, -0.05))}
        found = difference(one, dict.fromkeys(range(5), 30.0), margin=1.0)
        assert found.sd is not None
        half = quantile(0.90, 4) * found.sd / math.sqrt(5)
        inside = found.mean - half > -1 and found.mean + half < 1
        assert found.p_equivalent is not None
        assert (found.p_equivalent < 0.05) == inside, shift


def test_only_common_seeds_are_paired() -> None:
    found = difference({0: 11.0, 1: 22.0, 7: 99.0}, {0: 10.0, 1: 20.0, 3: 0.0}, margin=1.0)
    assert (found.test, found.seeds, found.mean) == ("paired", (0, 1), 1.5)


def test_welch_is_the_worked_example() -> None:
    # Variances 1 and 16 of three and five: se² = 1/3 + 16/5; the degrees of freedom after Satterthwaite.
    one, other = {0: 9.0, 1: 10.0, 2: 11.0}, {5: 2.0, 6: 8.0, 7: 8.0, 8: 8.0, 9: 14.0}
    variance = sum((value - 8) ** 2 for value in other.values()) / 4
    error = math.sqrt(1 / 3 + variance / 5)
    freedom = error**4 / ((1 / 3) ** 2 / 2 + (variance / 5) ** 2 / 4)
    found = difference(one, other, margin=1.0)
    assert (found.test, found.mean, found.n, found.each) == ("welch", 2.0, 3, ())
    assert found.p == pytest.approx(2 * upper_tail(2 / error, freedom))
    assert found.interval == (
        pytest.approx(2 - quantile(0.95, freedom) * error),
        pytest.approx(2 + quantile(0.95, freedom) * error),
    )


@pytest.mark.parametrize("other", [{0: 10.0}, {1: 10.0}, {1: 9.0, 2: 11.0}])
def test_one_seed_is_not_tested(other: dict[int, float]) -> None:
    found = difference({0: 12.0}, other, margin=1.0)
    assert (found.test, found.mean, found.interval, found.p, found.p_equivalent) == ("none", 2.0, None, None, None)


def test_equal_runs_are_equal() -> None:
    scores = {0: 36.1, 1: 37.2, 2: 35.3}
    found = difference(scores, scores, margin=1.0)
    assert (found.mean, found.sd, found.interval, found.p, found.p_equivalent) == (0.0, 0.0, (0.0, 0.0), 1.0, 0.0)


def test_holm_is_the_worked_example() -> None:
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1, never falling: .02, .03, .06, .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
