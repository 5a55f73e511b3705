"""BCKD: both functions by hand and against their formulas; the module: which anchors count, and by what weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import RowSuite, draw, draw_boxes
from reference_math import RTOL, chosen_anchors, cross_entropy, giou, logits, numbers, sigmoid, softmax, tensors

from cache_kd.losses.bckd import BCKD, bckd_box_loss, bckd_cls_loss

Cases = Callable[..., Any]


class TestBckdCls(RowSuite):
    call = staticmethod(bckd_cls_loss)
    student, teacher = draw(5, 3), draw(5, 3, seed=1)


class TestBckdBox(RowSuite):
    call = staticmethod(bckd_box_loss)
    student, teacher = draw_boxes(5, 0), draw_boxes(5, 1)


def bckd_row(student: np.ndarray, teacher: np.ndarray, beta: float = 1.0) -> float:
    pairs = zip(sigmoid(student), sigmoid(teacher), strict=True)
    return sum(abs(p - q) ** beta * cross_entropy(p, q) for q, p in pairs)


def test_cls_by_hand() -> None:
    # p_t = 3/4, p_s = 1/2: |gap| = 1/4, BCE against logit 0 = log 2.
    student, teacher = torch.zeros(2, 1), torch.full((2, 1), math.log(3))
    assert bckd_cls_loss(student, teacher).item() == pytest.approx(2 * math.log(2) / 4, rel=1e-6)
    assert bckd_cls_loss(student, teacher, beta=2.0).item() == pytest.approx(2 * math.log(2) / 16, rel=1e-6)


def test_cls_gap_is_not_detached() -> None:
    # d/ds [(p_t − p_s)·BCE] at s = 0 = −p_s(1 − p_s)·log 2 + (p_t − p_s)·(p_s − p_t), gap positive.
    student = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    bckd_cls_loss(student, torch.full((1, 1), math.log(3), dtype=torch.float64)).backward()
    assert student.grad is not None
    assert student.grad.item() == pytest.approx(-0.25 * math.log(2) - 0.25 * 0.25, rel=1e-9)


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ([0.0, 0.0, 2.0, 2.0], 0.0),
        ([0.0, 0.0, 1.0, 2.0], 0.5),  # half the area, hull = union
        ([1.0, 1.0, 3.0, 3.0], 1 - (1 / 7 - 2 / 9)),
        ([4.0, 0.0, 6.0, 2.0], 1 - (0 - 4 / 12)),  # apart: only the hull counts
    ],
)
def test_box_by_hand(student: list[float], expected: float) -> None:
    loss = bckd_box_loss(torch.tensor([student]), torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_box_is_finite_for_inverted_and_empty_boxes() -> None:
    student = torch.tensor([[2.0, 2.0, 1.0, 1.0], [0.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    loss = bckd_box_loss(student, torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(3, 4))
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_cls_equals_the_formula(beta: float) -> None:
    student, teacher, weight = numbers(6, 4, seed=0), numbers(6, 4, seed=1), np.abs(numbers(6, seed=2))
    expected = sum(w * bckd_row(s, t, beta) for s, t, w in zip(student, teacher, weight, strict=True)) / 7
    found = bckd_cls_loss(*tensors(student, teacher), beta=beta, weight=torch.from_numpy(weight), normalizer=7.0)
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_box_equals_the_formula() -> None:
    boxes = []
    for seed in (0, 1):
        low = numbers(8, 2, seed=seed)
        boxes.append(np.concatenate((low, low + 0.1 + np.abs(numbers(8, 2, seed=seed + 9))), 1))
    weight = np.abs(numbers(8, seed=2))
    expected = sum(w * (1 - giou(s, t)) for s, t, w in zip(*boxes, weight, strict=True)) / 7
    found = bckd_box_loss(*tensors(*boxes), weight=torch.from_numpy(weight), normalizer=7.0)
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_module(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64, reg_max=8)
    pairs, _, total = chosen_anchors(case)
    ours, theirs, our_boxes, their_boxes = logits(case)
    expected = sum(bckd_row(ours[i], theirs[i]) for i in np.ndindex(*ours.shape[:2]))
    centers = [(x + 0.5, y + 0.5) for f in case.output.features for y in range(f.shape[2]) for x in range(f.shape[3])]

    def decoded(sides: np.ndarray, anchor: int) -> np.ndarray:
        left, top, right, bottom = (float(softmax(side) @ np.arange(8)) for side in sides.reshape(4, 8))
        x, y = centers[anchor]
        return np.array([x - left, y - top, x + right, y + bottom])

    for image, anchor in pairs:
        i = (image, anchor)
        gap = np.abs(sigmoid(ours[i]) - sigmoid(theirs[i])).max()
        expected += 4.0 * gap * (1 - giou(decoded(our_boxes[i], anchor), decoded(their_boxes[i], anchor)))
    found = BCKD(case.teacher, case.student)(case.output, case.targets)
    assert found.item() == pytest.approx(expected / total, rel=RTOL)


def test_nearly_empty_batches_are_divided_by_one(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    targets = replace(case.targets, scores=case.targets.scores.detach() - 15)
    ours, theirs = case.output.scores.detach().numpy(), targets.scores.numpy()
    expected = sum(bckd_row(ours[i], theirs[i]) for i in np.ndindex(*ours.shape[:2]))
    assert BCKD(case.teacher, case.student)(case.output, targets).item() == pytest.approx(expected, rel=RTOL)


def test_weight_of_boxes_gets_no_gradient(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    with_boxes, without = (BCKD(case.teacher, case.student, box_weight=w) for w in (4.0, 0.0))
    slopes = [
        torch.autograd.grad(loss(case.output, case.targets), case.output.scores)[0] for loss in (with_boxes, without)
    ]
    torch.testing.assert_close(*slopes, rtol=0, atol=0)


@pytest.mark.parametrize("reg_max", [(1, 16), (16, 1), (8, 16)])
def test_each_side_is_decoded_with_its_own_bins(reg_max: tuple[int, int], make_case: Cases) -> None:
    ours, theirs = make_case(reg_max=reg_max[0]), make_case(reg_max=reg_max[1])
    targets = replace(ours.targets, boxes=theirs.targets.boxes)
    loss = BCKD(theirs.teacher, ours.student)(ours.output, targets)
    cls_only = BCKD(theirs.teacher, ours.student, box_weight=0.0)(ours.output, targets)
    assert loss.isfinite() and loss > cls_only
