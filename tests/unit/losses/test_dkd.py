"""DKD: the function by hand and against the formula of each protocol, the module against its rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import draw
from labelled_suite import LabelledModuleSuite, LabelledRowSuite
from reference_math import RTOL, binary_divergence, divergence, numbers, sigmoid, softmax, tensors
from torch import Tensor

from cache_kd.losses.dkd import dkd_loss
from cache_kd.losses.kd import kd_loss

TARGET = [3, 0, 1, 2, 2, 0]


class TestDkdSigmoid(LabelledRowSuite):
    method = "dkd"

    @staticmethod
    def call(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
        return dkd_loss(student, teacher, target, temperature=2.0, **options)


class TestDkdSoftmax(LabelledRowSuite):
    method = "dkd"

    @staticmethod
    def call(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
        return dkd_loss(student, teacher, target, temperature=2.0, protocol="softmax", **options)


def sigmoid_row(
    s: np.ndarray, t: np.ndarray, y: int, alpha: float = 1.0, beta: float = 0.25, temperature: float = 1.0
) -> float:
    pairs = enumerate(zip(sigmoid(t / temperature), sigmoid(s / temperature), strict=True))
    return sum((alpha if c == y else beta) * binary_divergence(p, q) for c, (p, q) in pairs) * temperature**2


def softmax_row(
    s: np.ndarray, t: np.ndarray, y: int, alpha: float = 1.0, beta: float = 0.25, temperature: float = 1.0
) -> float:
    p, q = softmax(t / temperature), softmax(s / temperature)
    own = binary_divergence(p[y], q[y])
    others = divergence(np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y]))
    return (alpha * own + beta * others) * temperature**2


class TestDkdModule(LabelledModuleSuite):
    method = "dkd"
    row = staticmethod(sigmoid_row)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.25), (0.3, 8.0)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_equals_the_formula(alpha: float, beta: float, temperature: float, protocol: str) -> None:
    student, teacher, weight = numbers(6, 4, seed=0), numbers(6, 4, seed=1), np.abs(numbers(6, seed=2))
    row = sigmoid_row if protocol == "sigmoid" else softmax_row
    rows = zip(student, teacher, TARGET, weight, strict=True)
    expected = sum(w * row(s, t, y, alpha, beta, temperature) for s, t, y, w in rows) / 7
    found = dkd_loss(
        *tensors(student, teacher),
        torch.tensor(TARGET),
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        protocol=protocol,
        weight=torch.from_numpy(weight),
        normalizer=7.0,
    )
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_defaults_are_those_of_coco() -> None:
    student, teacher = numbers(6, 4, seed=0), numbers(6, 4, seed=1)
    rows = zip(student, teacher, TARGET, strict=True)
    expected = np.mean([sigmoid_row(s, t, y, 1.0, 0.25, 1.0) for s, t, y in rows])
    assert dkd_loss(*tensors(student, teacher), torch.tensor(TARGET)).item() == pytest.approx(expected, rel=RTOL)


def test_softmax_by_hand() -> None:
    # The teacher's softmax is (1/2, 3/8, 1/8), so 3/4 and 1/4 without the target; the student's (1/2, 1/4, 1/4).
    teacher, student = (torch.tensor([[math.log(c) for c in row]]) for row in ((4.0, 3.0, 1.0), (2.0, 1.0, 1.0)))
    others = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = dkd_loss(student, teacher, torch.tensor([0]), protocol="softmax")
    assert loss.item() == pytest.approx(0.25 * others, rel=1e-5)
    # Class 1 as the target: 3/8 against 1/4, and (4/5, 1/5) against (2/3, 1/3) without it.
    own = 3 / 8 * math.log(3 / 2) + 5 / 8 * math.log(5 / 6)
    others = 4 / 5 * math.log(6 / 5) + 1 / 5 * math.log(3 / 5)
    loss = dkd_loss(student, teacher, torch.tensor([1]), alpha=2.0, beta=8.0, protocol="softmax")
    assert loss.item() == pytest.approx(2 * own + 8 * others, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_sigmoid_with_equal_factors_is_kd(temperature: float) -> None:
    student, teacher, target = draw(6, 4), draw(6, 4, seed=1), torch.tensor(TARGET)
    found = dkd_loss(student, teacher, target, alpha=1.0, beta=1.0, temperature=temperature)
    assert found.item() == pytest.approx(kd_loss(student, teacher, temperature=temperature).item(), rel=1e-12)


def test_softmax_kd_is_own_and_the_rest_by_its_probability() -> None:
    student, teacher, target = draw(6, 4), draw(6, 4, seed=1), torch.tensor(TARGET)
    rest = 1 - teacher.softmax(-1).gather(1, target[:, None])[:, 0]
    own = dkd_loss(student, teacher, target, alpha=1.0, beta=0.0, protocol="softmax")
    others = dkd_loss(student, teacher, target, alpha=0.0, beta=1.0, protocol="softmax", weight=rest)
    expected = kd_loss(student, teacher, temperature=1.0, protocol="softmax")
    assert (own + others).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("gap", [200.0, 5000.0])
def test_a_class_far_from_the_others_keeps_value_and_gradient(gap: float) -> None:
    """Probabilities are 0 and 1 in float32: their logarithm is infinite, a class taken off by −1000 is back again."""
    student = torch.tensor([[gap, 0.0, 1.0]], requires_grad=True)
    loss = dkd_loss(student, torch.zeros(1, 3), torch.tensor([0]), beta=0.0, protocol="softmax")
    rest = math.log(1 + math.e)
    assert loss.item() == pytest.approx(2 / 3 * (gap - rest) + 1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3), 1e-5)
    (slope,) = torch.autograd.grad(loss, student)
    assert slope[0, 0].item() == pytest.approx(2 / 3, rel=1e-5)
    others = dkd_loss(
        student, torch.tensor([[gap, 1.0, 0.0]]), torch.tensor([0]), alpha=0.0, beta=1.0, protocol="softmax"
    )
    p = math.e / (1 + math.e)
    assert others.item() == pytest.approx(2 * p - 1, rel=1e-5)


def test_one_class() -> None:
    student, teacher, target = draw(5, 1).requires_grad_(), draw(5, 1, seed=1), torch.zeros(5, dtype=torch.int64)
    expected = kd_loss(student, teacher, temperature=1.0)
    assert dkd_loss(student, teacher, target).item() == pytest.approx(expected.item(), rel=1e-12)
    constant = dkd_loss(student, teacher, target, protocol="softmax")
    (slope,) = torch.autograd.grad(constant, student)
    assert constant.item() == 0 and slope.abs().sum() == 0
