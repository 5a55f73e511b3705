"""LD: the function by hand and against its formula, the module against which anchors count and by what weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import RowSuite, draw
from reference_math import RTOL, chosen_anchors, divergence, logits, numbers, softmax, tensors

from cache_kd.errors import MismatchError
from cache_kd.losses.ld import LD, ld_loss
from cache_kd.structures import HeadSpec


class TestLd(RowSuite):
    call = staticmethod(ld_loss)
    student, teacher = draw(5, 4, 4), draw(5, 4, 4, seed=1)


def ld_row(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    bins = student.shape[-1]
    return sum(
        divergence(softmax(teacher[side] / temperature), softmax(student[side] / temperature)) / bins * temperature**2
        for side in range(4)
    )


def test_by_hand() -> None:
    # Two bins, one side differs; T = 1: the sum over sides of the mean over bins.
    teacher, student = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    teacher[0, 2, 0] = math.log(3)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert ld_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)
    assert ld_loss(student, 10 * teacher).item() == pytest.approx(100 * expected, rel=1e-5)


def test_does_not_see_a_constant_a_side() -> None:
    student, teacher = TestLd.student, TestLd.teacher
    shifted = teacher - teacher.amax(-1, keepdim=True)
    assert ld_loss(student, shifted).item() == pytest.approx(ld_loss(student, teacher).item(), rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_keeps_the_scale_of_small_gradients(temperature: float) -> None:
    """T² is there so that near the teacher the gradient hardly depends on T."""
    teacher = draw(1, 4, 6) * 1e-3

    def slope(temperature: float) -> float:
        student = torch.zeros_like(teacher).requires_grad_()
        loss = ld_loss(student, teacher, temperature=temperature)
        return float(torch.autograd.grad(loss, student)[0].norm())

    assert slope(temperature) == pytest.approx(slope(1.0), 1e-2)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_equals_the_formula(temperature: float) -> None:
    student, teacher, weight = numbers(5, 4, 8, seed=0), numbers(5, 4, 8, seed=1), np.abs(numbers(5, seed=2))
    expected = sum(w * ld_row(s, t, temperature) for s, t, w in zip(student, teacher, weight, strict=True)) / 7
    found = ld_loss(
        *tensors(student, teacher), temperature=temperature, weight=torch.from_numpy(weight), normalizer=7.0
    )
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_default_temperature_is_the_papers() -> None:
    student, teacher = numbers(2, 4, 8, seed=0), numbers(2, 4, 8, seed=1)
    found = ld_loss(*tensors(student, teacher)).item()
    assert found == pytest.approx(sum(map(ld_row, student, teacher, (10.0, 10.0))), rel=RTOL)


def test_module(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64, reg_max=8)
    pairs, sure, total = chosen_anchors(case)
    _, _, ours, theirs = logits(case)
    rows = (sure[i] * ld_row(ours[i].reshape(4, 8), theirs[i].reshape(4, 8), 10.0) for i in pairs)
    found = LD(case.teacher, case.student)(case.output, case.targets)
    assert found.item() == pytest.approx(sum(rows) / total, rel=RTOL)


@pytest.mark.parametrize("reg_max", [(16, 8), (1, 16), (16, 1)])
def test_unequal_bins_are_refused(reg_max: tuple[int, int], head: Callable[..., HeadSpec]) -> None:
    with pytest.raises(MismatchError, match=r"loss ld.*allowed: equal and at least 2"):
        LD(head(8, reg_max=reg_max[0]), head(8, reg_max=reg_max[1]))
