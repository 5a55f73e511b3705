"""MIMIC: the function by hand and against its formula, the module against the sum over levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors

from cache_kd.losses.mimic import MIMIC, mimic_loss


class TestMimic(FunctionSuite):
    call = staticmethod(mimic_loss)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)


def mimic_value(student: np.ndarray, teacher: np.ndarray) -> float:
    return sum((s - t) ** 2 for s, t in zip(student.ravel(), teacher.ravel(), strict=True)) / student.size


def test_by_hand() -> None:
    student, teacher = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]])
    assert mimic_loss(student, teacher).item() == pytest.approx((1 + 4 + 9 + 16) / 4)


def test_equals_the_formula() -> None:
    student, teacher = numbers(2, 3, 5, 4, seed=0), numbers(2, 3, 5, 4, seed=1)
    assert mimic_loss(*tensors(student, teacher)).item() == pytest.approx(mimic_value(student, teacher), rel=RTOL)


def test_no_images_give_a_differentiable_zero() -> None:
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = mimic_loss(student, torch.zeros(0, 3, 2, 2))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


def test_module_sums_levels_behind_convolutions_of_its_own(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64)
    mimic = MIMIC(case.teacher, case.student).double()
    assert [tuple(adapter.weight.shape[:2]) for adapter in mimic.adapters] == [(12, 8), (16, 16), (10, 6)]
    levels = zip(mimic.adapters, case.output.features, case.targets.features, strict=True)
    expected = sum(mimic_value(a(s).detach().numpy(), t.detach().numpy()) for a, s, t in levels)
    assert mimic(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)
