"""Identities are compared leaf by leaf, data sets image by image, and every difference is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_kd.errors import MismatchError
from cache_kd.fingerprint import (
    ABSENT,
    SourceImage,
    compare_sources,
    differences,
    digest_sources,
    listed,
    source_changes,
)

SHA = {name: name * 32 for name in "abcdef"}
Rows = list[SourceImage]


def rows(count: int = 5) -> Rows:
    return [SourceImage(f"{i}.jpg", 10, f"{i}{'a' * 31}", f"{i}{'b' * 31}") for i in range(count)]


def changed(row: SourceImage, **values: str) -> SourceImage:
    return replace(row, **values)


# -- identities -------------------------------------------------------------------------------------------------------


def test_each_leaf_that_differs_is_named_with_both_values() -> None:
    there = {"seed": 0, "recipe": {"mosaic": 1.0, "classes": None}, "teacher": {"weights": SHA["a"]}, "old": {}}
    wanted = {"seed": 0, "recipe": {"mosaic": 0.5, "classes": [1]}, "teacher": {"weights": SHA["b"]}, "new": 1}
    found = differences(there, wanted)
    assert [str(change) for change in found] == [
        "new: nothing there, 1 wanted",
        "old: {} there, nothing wanted",
        "recipe.classes: null there, [1] wanted",
        "recipe.mosaic: 1.0 there, 0.5 wanted",
        "teacher.weights: aaaaaaaaaaaa there, bbbbbbbbbbbb wanted",
    ]
    assert found[0].there is ABSENT and found[3].there == 1.0
    assert differences(there, there) == ()


def test_a_value_of_null_is_not_an_absent_one() -> None:
    (change,) = differences({"a": None}, {})
    assert str(change) == "a: null there, nothing wanted"


def test_a_long_value_and_a_long_list_are_cut() -> None:
    (change,) = differences({"names": ["x" * 200]}, {"names": []})
    assert len(str(change)) < 100 and "…" in str(change)
    assert listed(range(6)) == "0; 1; 2; 3; 4; 5"
    assert listed(range(9)) == "0; 1; 2; 3; 4; 5; and 3 more"


# -- data sets --------------------------------------------------------------------------------------------------------

MUTATIONS: dict[str, tuple[Callable[[Rows], Rows], list[str]]] = {
    "image changed": (
        lambda r: [*r[:2], changed(r[2], image="f" * 32), *r[3:]],
        ["the image of item 2 (2.jpg) changed: content 2aaaaaaaaaaa there, ffffffffffff now"],
    ),
    "image changed and renamed": (
        lambda r: [*r[:2], changed(r[2], image="f" * 32, path="x.jpg"), *r[3:]],
        ["the image of item 2 (x.jpg) changed: content 2aaaaaaaaaaa there, ffffffffffff now"],
    ),
    "image copied over another": (
        lambda r: [r[0], changed(r[1], image=r[0].image), *r[2:]],
        ["the image of item 1 (1.jpg) changed: content 1aaaaaaaaaaa there, 0aaaaaaaaaaa now"],
    ),
    "label changed": (
        lambda r: [changed(r[0], label="f" * 32), *r[1:]],
        ["the label of item 0 (0.jpg) changed: content 0bbbbbbbbbbb there, ffffffffffff now"],
    ),
    "label removed": (
        lambda r: [changed(r[0], label=""), *r[1:]],
        ["the label of item 0 (0.jpg) changed: content 0bbbbbbbbbbb there, absent now"],
    ),
    "image removed": (
        lambda r: [*r[:1], *r[2:]],
        ["5 usable images there, 4 now", "image 1.jpg (item 1 there) is gone"],
    ),
    "image added": (
        lambda r: [*r[:1], SourceImage("0b.jpg", 10, "f" * 32, ""), *r[1:]],
        ["5 usable images there, 6 now", "image 0b.jpg (item 1 now) is new"],
    ),
    "one removed, one changed": (
        lambda r: [*r[:1], changed(r[2], image="f" * 32), *r[3:]],
        [
            "5 usable images there, 4 now",
            "the image of item 1 (2.jpg) changed: content 2aaaaaaaaaaa there, ffffffffffff now",
            "image 1.jpg (item 1 there) is gone",
        ],
    ),
    "two swapped with their labels": (
        lambda r: [r[0], r[3], r[2], r[1], r[4]],
        [
            "other order: item 1 was 1.jpg, item 1 is 3.jpg (content 1aaaaaaaaaaa there, 3aaaaaaaaaaa now)",
            "other order: item 3 was 3.jpg, item 3 is 1.jpg (content 3aaaaaaaaaaa there, 1aaaaaaaaaaa now)",
        ],
    ),
    "one removed, two swapped": (
        lambda r: [r[1], r[4], r[3], r[2]],
        [
            "5 usable images there, 4 now",
            "image 0.jpg (item 0 there) is gone",
            "other order: item 2 was 2.jpg, item 1 is 4.jpg (content 2aaaaaaaaaaa there, 4aaaaaaaaaaa now)",
            "other order: item 4 was 4.jpg, item 3 is 2.jpg (content 4aaaaaaaaaaa there, 2aaaaaaaaaaa now)",
        ],
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_changed_in_a_data_set_is_named(name: str) -> None:
    change, says = MUTATIONS[name]
    assert source_changes(rows(), change(rows())) == says
    with pytest.raises(MismatchError, match=r"not the one that the teacher saw: .*; restore it, or extract again"):
        compare_sources(rows(), change(rows()))


def test_other_names_in_the_same_order_are_no_change() -> None:
    renamed = [changed(row, path=f"other/{row.path}") for row in rows()]
    assert source_changes(rows(), renamed) == []
    compare_sources(rows(), renamed)
    assert digest_sources(rows()) == digest_sources(renamed)


def test_many_changes_are_one_bounded_line() -> None:
    other = [changed(row, image="f" * 31 + str(i % 10)) for i, row in enumerate(rows(200))]
    with pytest.raises(MismatchError, match=r"item 5 .*; and 194 more; restore it") as caught:
        compare_sources(rows(200), other)
    assert len(str(caught.value)) < 1200 and "\n" not in str(caught.value)


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8), st.integers(0, 2**32))
def test_no_change_is_named_exactly_when_the_identities_agree(before: list[int], after: list[int], seed: int) -> None:
    """Images that occur several times included."""
    labels = random.Random(seed)

    def made(contents: list[int]) -> Rows:
        return [SourceImage(f"{i}.jpg", 1, f"{c}" * 32, labels.choice(["", "e" * 32])) for i, c in enumerate(contents)]

    old, new = made(before), made(after)
    assert bool(source_changes(old, new)) == (digest_sources(old) != digest_sources(new))
    assert source_changes(old, old) == []
