"""IFVD: the function by hand and against its formula, the module against the raster of its labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors

from cache_kd.errors import MismatchError
from cache_kd.losses.ifvd import IFVD, ifvd_loss
from cache_kd.losses.rasters import label_map
from cache_kd.structures import Labels

# Class 1 is absent from the first image, class 4 has one cell, class 3 is nowhere.
MAP = torch.tensor([[[0, 0, -1, 2], [2, 0, -1, -1]], [[1, 1, 0, 4], [1, 2, 2, 0]]])


class TestIfvd(FunctionSuite):
    student, teacher = draw(2, 3, 2, 4), draw(2, 3, 2, 4, seed=1)
    extras = (MAP,)
    call = staticmethod(ifvd_loss)


def likeness(features: np.ndarray, labels: np.ndarray, ignore_index: int) -> np.ndarray:
    """Cosine of each cell with the mean of its class in its image, 1 where the label is ignored."""
    images, channels, height, width = features.shape
    result = np.ones((images, height, width))
    for n, y, x in np.ndindex(images, height, width):
        if labels[n, y, x] == ignore_index:
            continue
        total, count = np.zeros(channels), 0
        for i, j in np.ndindex(height, width):
            if labels[n, i, j] == labels[n, y, x]:
                total, count = total + features[n, :, i, j], count + 1
        mean, own = total / (count + 1e-6), features[n, :, y, x]
        result[n, y, x] = own @ mean / (np.linalg.norm(own) * np.linalg.norm(mean))
    return result


def reference(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, ignore_index: int = -1) -> float:
    gap = likeness(student, labels, ignore_index) - likeness(teacher, labels, ignore_index)
    return float((gap**2).sum() / gap.size)


def test_by_hand() -> None:
    # Class 0: (1, 0) and (0, 1) against their mean, cos = 1/√2 for both; the teacher's two agree, cos = 1.
    # The third cell is ignored, but divides: 2 · (1 − 1/√2)² / 3.
    student = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, -7.0]]).view(1, 2, 1, 3)
    teacher = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 1.0]]).view(1, 2, 1, 3)
    loss = ifvd_loss(student, teacher, torch.tensor([[[0, 0, -1]]]))
    assert loss.item() == pytest.approx(2 * (1 - 0.5**0.5) ** 2 / 3, rel=1e-5)
    # The same cells in images of their own: each is its class's mean.
    split = [tensor.permute(3, 1, 2, 0) for tensor in (student, teacher)]
    assert ifvd_loss(*split, torch.tensor([0, 0, -1]).view(3, 1, 1)).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("ignore_index", [-1, 2, 77])
def test_equals_the_formula(ignore_index: int) -> None:
    student, teacher = numbers(2, 3, 2, 4, seed=0), numbers(2, 5, 2, 4, seed=1)
    found = ifvd_loss(*tensors(student, teacher), MAP, ignore_index=ignore_index)
    assert found.item() == pytest.approx(reference(student, teacher, MAP.numpy(), ignore_index), rel=RTOL)


def test_gradient_flows_through_the_means() -> None:
    """Finite differences of the reference, whose means move with the cells."""
    student, teacher = numbers(1, 2, 1, 3, seed=0), numbers(1, 2, 1, 3, seed=1)
    labels = np.array([[[0, 0, 1]]])
    ours = torch.from_numpy(student).requires_grad_()
    ifvd_loss(ours, torch.from_numpy(teacher), torch.from_numpy(labels)).backward()
    step = 1e-6
    for index in np.ndindex(student.shape):
        low, high = student.copy(), student.copy()
        low[index] -= step
        high[index] += step
        slope = (reference(high, teacher, labels) - reference(low, teacher, labels)) / (2 * step)
        assert ours.grad is not None and ours.grad[index].item() == pytest.approx(slope, abs=1e-8)


def test_classes_are_only_names() -> None:
    student, teacher = TestIfvd.student, TestIfvd.teacher
    renamed = torch.where(MAP == -1, 255, 1000 - MAP).to(torch.int32)
    found = ifvd_loss(student, teacher, renamed, ignore_index=255)
    assert found.item() == pytest.approx(ifvd_loss(student, teacher, MAP).item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (0, 3, 2, 4)])
def test_nothing_labelled_gives_a_differentiable_zero(shape: tuple[int, ...]) -> None:
    student = draw(*shape).requires_grad_()
    loss = ifvd_loss(student, draw(*shape, seed=1), torch.full((shape[0], 2, 4), -1))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and student.grad.abs().sum() == 0


def test_zero_vectors_have_neither_likeness_nor_gradient() -> None:
    student = draw(2, 3, 2, 4).float()
    student[0, :, 0, 0] = 0  # a cell
    student[1, :, 0, :2] = torch.tensor([[1.0, -1.0]])  # two cells of class 1 that cancel each other …
    student[1, :, 1, 0] = 0  # … beside a third
    student.requires_grad_()
    loss = ifvd_loss(student, TestIfvd.teacher.float(), MAP)
    loss.backward()
    theirs = likeness(TestIfvd.teacher.numpy(), MAP.numpy(), -1)
    with np.errstate(invalid="ignore"):
        ours = np.nan_to_num(likeness(student.detach().double().numpy(), MAP.numpy(), -1))
    assert loss.item() == pytest.approx(((ours - theirs) ** 2).mean(), rel=1e-5)
    assert student.grad is not None and 1e-4 < student.grad.abs().max() < 10


@pytest.mark.parametrize("labels", [torch.zeros(2, 4, 2, dtype=torch.int64), torch.zeros(2, 2, 4)])
def test_labels_are_one_integer_a_cell(labels: torch.Tensor) -> None:
    with pytest.raises(MismatchError, match=r"label_map is torch.*; allowed: one integer a cell, \(2, 2, 4\)"):
        ifvd_loss(TestIfvd.student, TestIfvd.teacher, labels)


@pytest.mark.parametrize("background", [False, True])
def test_module_sums_levels_under_the_raster_of_their_stride(make_case: Callable[..., Any], background: bool) -> None:
    case = make_case(dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0.0, 30.0, 40.0], [2.0, 9.0, 21.0, 26.0], [20.0, 0.0, 56.0, 24.0]])
    labels = Labels(torch.tensor([0, 0, 1]), torch.tensor([2, 0, 1]), boxes)
    targets = replace(case.targets, labels=labels)
    expected = 0.0
    for level, (ours, theirs) in enumerate(zip(case.output.features, targets.features, strict=True)):
        raster = label_map(
            [boxes[:2], boxes[2:]],
            [torch.tensor([2, 0]), torch.tensor([1])],
            size=tuple(ours.shape[2:]),
            stride=8 << level,
            ignore_index=3 if background else -1,
        )
        expected += reference(ours.detach().numpy(), theirs.detach().numpy(), raster.numpy())
    found = IFVD(case.teacher, case.student, background=background)(case.output, targets)
    assert expected > 1e-3
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_module_without_any_box(make_case: Callable[..., Any]) -> None:
    case = make_case()
    none = Labels(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    targets = replace(case.targets, labels=none)
    loss = IFVD(case.teacher, case.student)(case.output, targets)
    loss.backward()
    assert loss.item() == 0 and case.output.features[0].grad is not None
    assert IFVD(case.teacher, case.student, background=True)(case.output, targets) > 1e-3


def test_module_asks_for_labels(make_case: Callable[..., Any]) -> None:
    case = make_case()
    with pytest.raises(MismatchError, match="loss ifvd needs labels"):
        IFVD(case.teacher, case.student)(case.output, replace(case.targets, labels=None))
