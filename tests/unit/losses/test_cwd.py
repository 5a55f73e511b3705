"""CWD: the function by hand and against its formula, the module against the sum over levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, divergence, numbers, softmax, tensors
from torch import nn

from cache_kd.losses.cwd import CWD, cwd_loss


class TestCwd(FunctionSuite):
    call = staticmethod(cwd_loss)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)


def cwd_value(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    images, channels = student.shape[:2]
    total = 0.0
    for n in range(images):
        for c in range(channels):
            p, q = softmax(teacher[n, c].ravel() / temperature), softmax(student[n, c].ravel() / temperature)
            total += divergence(p, q)
    return temperature**2 / (images * channels) * total


def test_by_hand() -> None:
    # Two positions: the teacher's softmax is (3/4, 1/4), the student's (1/2, 1/2).
    teacher, student = torch.tensor([[[[math.log(3), 0.0]]]]), torch.zeros(1, 1, 1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert cwd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    # Temperature 2 on twice the logits: the same distributions, times T².
    assert cwd_loss(student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * expected, rel=1e-6)
    # A mean over images and channels.
    wide = teacher.expand(3, 5, 1, 2)
    assert cwd_loss(torch.zeros_like(wide), wide).item() == pytest.approx(expected, rel=1e-6)


def test_does_not_see_a_constant_a_channel() -> None:
    student, teacher = TestCwd.student, TestCwd.teacher
    shift = draw(2, 3, 1, 1, seed=9)
    assert cwd_loss(student + shift, teacher).item() == pytest.approx(cwd_loss(student, teacher).item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_keeps_the_scale_of_small_gradients(temperature: float) -> None:
    """T² is there so that near the teacher the gradient hardly depends on T."""
    teacher = draw(1, 4, 1, 6) * 1e-3

    def slope(temperature: float) -> float:
        student = torch.zeros_like(teacher).requires_grad_()
        loss = cwd_loss(student, teacher, temperature=temperature)
        return float(torch.autograd.grad(loss, student)[0].norm())

    assert slope(temperature) == pytest.approx(slope(1.0), 1e-2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_formula(temperature: float) -> None:
    student, teacher = numbers(2, 3, 5, 4, seed=0), numbers(2, 3, 5, 4, seed=1)
    found = cwd_loss(*tensors(student, teacher), temperature=temperature)
    assert found.item() == pytest.approx(cwd_value(student, teacher, temperature), rel=RTOL)


def test_default_temperature_is_the_papers() -> None:
    student, teacher = numbers(2, 4, 1, 8, seed=0), numbers(2, 4, 1, 8, seed=1)
    assert cwd_loss(*tensors(student, teacher)).item() == pytest.approx(cwd_value(student, teacher, 1.0), rel=RTOL)


def test_module_sums_levels(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64)
    cwd = CWD(case.teacher, case.student).double()
    levels = zip(cwd.adapters, case.output.features, case.targets.features, strict=True)
    expected = sum(cwd_value(a(s).detach().numpy(), t.detach().numpy(), 1.0) for a, s, t in levels)
    assert cwd(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


def test_maps_of_equal_channels_are_left_alone(make_case: Callable[..., Any]) -> None:
    case = make_case()
    kinds = [type(adapter) for adapter in CWD(case.teacher, case.student).adapters]
    assert kinds == [nn.Conv2d, nn.Identity, nn.Conv2d]
