"""A budget picks what is best within it, in a fixed order of preference, and sizes are read in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_kd.config import parse_size
from cache_kd.errors import DiskSpaceError, SettingError
from cache_kd.pipeline.budget import MARGIN, ViewBytes, choose
from cache_kd.pipeline.sizes import duration, megabytes

SIZES = {
    name: ViewBytes(size, size) for name, size in (("safe", 20.0), ("default", 10.0), ("small", 8.0), ("tiny", 5.0))
}


@pytest.mark.parametrize(
    ("room", "views", "expected"),
    [
        (1e6, 8, ("safe", 8)),  # all at a finer fidelity
        (179.0, 8, ("default", 8)),  # safe has room for 7
        (90.0, 8, ("default", 8)),
        (89.0, 8, ("default", 7)),  # views before fidelity only below four
        (50.0, 8, ("default", 4)),
        (49.9, 8, ("small", 5)),  # four of default and the plain one take 50
        (39.9, 8, ("tiny", 6)),  # small has room for three
        (24.9, 8, ("tiny", 3)),  # no fidelity has room for four
        (10.0, 8, ("tiny", 1)),
        (24.0, 1, ("default", 1)),  # never more views than asked
        (5.0, 0, ("tiny", 0)),
        (10.0, 0, ("default", 0)),
    ],
)
def test_views_and_fidelity_are_chosen_in_this_order(room: float, views: int, expected: tuple[str, int]) -> None:
    choice = choose(int(1000 * MARGIN * room) + 1, scaled(1000), views=views, plain_views=1)
    assert (choice.fidelity, choice.views) == expected


def scaled(factor: float) -> dict[str, ViewBytes]:
    return {name: ViewBytes(factor * size.mixed, factor * size.plain) for name, size in SIZES.items()}


def test_the_reason_names_what_was_considered() -> None:
    choice = choose(50_000, scaled(1000), views=8, plain_views=1)
    assert choice.reason == (
        "budget 50.0 kB: fidelity small, 4 of 8 mixed views and 1 plain, about 40.0 kB: default has room for 3 only, "
        "and 4 views come first",
        "mixed views that fit, of 8: safe 1, default 3, small 4, tiny 8",
    )


def test_too_little_for_one_view_is_refused_with_what_it_takes() -> None:
    with pytest.raises(DiskSpaceError, match=r"^--budget 10.0 kB is too small: 1 mixed and 1 plain .* take 10.5 kB; "):
        choose(10_000, scaled(1000), views=8, plain_views=1)


@given(budget=st.integers(1, 10**7), views=st.integers(0, 30), plain=st.integers(0, 3), fixed=st.integers(0, 10**5))
def test_a_choice_fits_and_never_has_more_views_than_asked(budget: int, views: int, plain: int, fixed: int) -> None:
    sizes = scaled(1000)
    try:
        choice = choose(budget, sizes, views=views, plain_views=plain, fixed_bytes=fixed)
    except DiskSpaceError:
        tiny = sizes["tiny"]
        assert fixed + min(1, views) * tiny.mixed + plain * tiny.plain > budget / MARGIN - 1
        return
    assert min(1, views) <= choice.views <= views
    size = sizes[choice.fidelity]
    assert (fixed + choice.views * size.mixed + plain * size.plain) * MARGIN <= budget * (1 + 1e-9)


@pytest.mark.parametrize(
    ("text", "count"),
    [("500MB", 500e6), ("40GB", 40e9), ("1.5TB", 1.5e12), (" 2 kb ", 2000), ("7B", 7), (".5GB", 5e8), ("3gb", 3e9)],
)
def test_sizes_are_read(text: str, count: float) -> None:
    assert parse_size(text, "--budget") == count


@pytest.mark.parametrize("text", ["40", "GB", "-1GB", "0GB", "1,5GB", "1e3MB", "infGB", "40GB free"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"^--budget .* is no size; allowed: a number and a unit, as 500MB, 40GB"):
        parse_size(text, "--budget")


def test_bytes_and_seconds_are_said() -> None:
    assert [megabytes(n) for n in (999, 1500, 2.5e6, 4e10, 3e12)] == ["999 B", "1.5 kB", "2.5 MB", "40.0 GB", "3.0 TB"]
    assert [duration(n) for n in (3.21, 119, 120, 7200, 2e6)] == ["3.2 s", "119.0 s", "2.0 min", "2.0 h", "23.1 d"]
