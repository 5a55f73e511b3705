"""PI: the function by hand and against its formula in both protocols, the module against its levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, binary_divergence, divergence, numbers, sigmoid, softmax, tensors
from torch import Tensor

from cache_kd.errors import SettingError
from cache_kd.losses import build_loss, parse_loss
from cache_kd.losses.pi import PI, pi_loss


class TestPiSigmoid(FunctionSuite):
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)
    call = staticmethod(pi_loss)


class TestPiSoftmax(FunctionSuite):
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)

    @staticmethod
    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return pi_loss(student, teacher, protocol="softmax")


def reference(student: np.ndarray, teacher: np.ndarray, protocol: str) -> float:
    images, _, height, width = student.shape
    total = 0.0
    for n, y, x in np.ndindex(images, height, width):
        s, t = student[n, :, y, x], teacher[n, :, y, x]
        if protocol == "sigmoid":
            total += sum(binary_divergence(p, q) for p, q in zip(sigmoid(t), sigmoid(s), strict=True))
        else:
            total += divergence(softmax(t), softmax(s))
    return total / (images * height * width)


def test_by_hand() -> None:
    # One of two cells differs: σ(log 3) = 3/4 against 1/2; two images of the same.
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    teacher = torch.tensor([math.log(3), 0.0]).expand(2, 1, 1, 2)
    assert pi_loss(torch.zeros(2, 1, 1, 2), teacher).item() == pytest.approx(expected, rel=1e-6)
    # Every class adds its own; as a softmax over two classes it is one pair of numbers.
    wide = teacher.expand(2, 3, 1, 2)
    assert pi_loss(torch.zeros(2, 3, 1, 2), wide).item() == pytest.approx(3 * expected, rel=1e-6)
    pair = torch.cat((teacher, torch.zeros(2, 1, 1, 2)), 1)
    found = pi_loss(torch.zeros(2, 2, 1, 2), pair, protocol="softmax")
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_equals_the_formula(protocol: str) -> None:
    student, teacher = numbers(3, 4, 2, 5, seed=0), numbers(3, 4, 2, 5, seed=1)
    found = pi_loss(*tensors(student, teacher), protocol=protocol)
    assert found.item() == pytest.approx(reference(student, teacher, protocol), rel=RTOL)


def test_default_is_sigmoid_and_only_it_sees_a_common_shift() -> None:
    student = TestPiSigmoid.student
    assert pi_loss(student + 3, student) > 0.1
    assert pi_loss(student + 3, student, protocol="softmax").item() == pytest.approx(0, abs=1e-12)


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(SettingError, match=r"no protocol 'softmx'; known: sigmoid, softmax; did you mean 'softmax'\?"):
        pi_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), protocol="softmx")


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2)])
@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_no_cells_give_a_differentiable_zero(shape: tuple[int, ...], protocol: str) -> None:
    student = torch.zeros(shape, requires_grad=True)
    loss = pi_loss(student, torch.zeros(shape), protocol=protocol)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_module_sums_the_means_of_levels(make_case: Callable[..., Any], protocol: str) -> None:
    case = make_case(dtype=torch.float64)
    expected, first = 0.0, 0
    for level in case.output.features:
        height, width = level.shape[2:]
        part = slice(first, first + height * width)
        ours, theirs = (
            scores[:, part].detach().numpy().transpose(0, 2, 1).reshape(2, 3, height, width)
            for scores in (case.output.scores, case.targets.scores)
        )
        expected += reference(ours, theirs, protocol)
        first += height * width
    loss = PI(case.teacher, case.student, protocol=protocol)
    assert loss(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


def test_softmax_with_one_class_is_refused(make_case: Callable[..., Any]) -> None:
    case = make_case(classes=1)
    with pytest.raises(SettingError, match=r"loss pi: protocol=softmax with one class is constantly zero"):
        build_loss(parse_loss("pi:protocol=softmax"), case.teacher, case.student)
