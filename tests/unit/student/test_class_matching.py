"""Classes of teacher and student belong together by name."""

from __future__ import annotations

import pytest
import torch

from cache_kd.errors import MismatchError
from cache_kd.losses import parse_losses
from cache_kd.structures import DetectorOutput, HeadSpec, Tap, TargetBatch
from cache_kd.student.distiller import Distiller, match_classes

TEACHER = ("cell", "cat", "dog")
TAPS = (Tap("P3", 4, 8), Tap("P4", 4, 16), Tap("P5", 4, 32))
ANCHORS = 64 + 16 + 4


def test_equal_names_need_no_map() -> None:
    assert match_classes(TEACHER, TEACHER, needed_by=["kd"]) is None


@pytest.mark.parametrize(
    ("student", "expected"), [(("dog", "cell", "cat"), (2, 0, 1)), (("dog",), (2,)), (("cat", "cell"), (1, 0))]
)
def test_the_map_says_where_the_teacher_has_each_class(student: tuple[str, ...], expected: tuple[int, ...]) -> None:
    assert match_classes(TEACHER, student, needed_by=["kd"]) == expected
    assert match_classes(TEACHER, student, needed_by=[]) == expected


def test_an_unknown_class_is_refused_where_logits_are_needed() -> None:
    with pytest.raises(MismatchError, match=r"classes bird, which bckd and kd would need; it knows cell, cat, dog;"):
        match_classes(TEACHER, ("cat", "bird"), needed_by=["bckd", "kd"])


def test_an_unknown_class_does_not_matter_for_features() -> None:
    assert match_classes(TEACHER, ("cat", "bird"), needed_by=[]) is None


def output(scores: torch.Tensor) -> DetectorOutput:
    features = tuple(torch.zeros(1, 4, size, size) for size in (8, 4, 2))
    return DetectorOutput(features, scores, torch.zeros(1, ANCHORS, 64))


def test_the_teachers_columns_reach_a_loss_in_the_students_order() -> None:
    teacher = HeadSpec(TAPS, 16, TEACHER)
    scores = torch.randn(1, ANCHORS, 3, generator=torch.Generator().manual_seed(0))
    targets = TargetBatch(scores=scores, boxes=torch.zeros(1, ANCHORS, 64), sent=torch.ones(1, ANCHORS, dtype=bool))
    permuted = Distiller(parse_losses(["kd"]), teacher, HeadSpec(TAPS, 16, ("dog", "cell", "cat")), seed=0)
    straight = Distiller(parse_losses(["kd"]), teacher, teacher, seed=0)
    right = permuted(output(scores[..., [2, 0, 1]]), targets)["kd"]
    assert torch.equal(right, straight(output(scores), targets)["kd"])
    assert permuted(output(scores), targets)["kd"] > right


def test_adapters_start_from_the_seed_and_leave_the_callers_random_numbers_alone() -> None:
    teacher, student = HeadSpec(TAPS, 16, TEACHER), HeadSpec(tuple(Tap(t.name, 6, t.stride) for t in TAPS), 16, TEACHER)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = dict(Distiller(parse_losses(["cwd"]), teacher, student, seed=1).named_parameters())
    assert torch.equal(torch.rand(3), expected)
    same = dict(Distiller(parse_losses(["cwd"]), teacher, student, seed=1).named_parameters())
    other = dict(Distiller(parse_losses(["cwd"]), teacher, student, seed=2).named_parameters())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
