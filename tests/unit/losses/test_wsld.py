"""WSLD: the function by hand and against the formula of each protocol, the module against its rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import draw
from labelled_suite import LabelledModuleSuite, LabelledRowSuite
from reference_math import RTOL, binary_divergence, cross_entropy, numbers, sigmoid, softmax, tensors
from torch import Tensor

from cache_kd.losses.kd import kd_loss
from cache_kd.losses.wsld import wsld_loss

TARGET = [3, 0, 1, 2, 2, 0]


def factor(student_loss: float, teacher_loss: float) -> float:
    return 1 - math.exp(-student_loss / (teacher_loss + 1e-7))


def sigmoid_factor(s: np.ndarray, t: np.ndarray, y: int) -> float:
    return factor(*(sum(cross_entropy(float(c == y), p) for c, p in enumerate(sigmoid(z))) for z in (s, t)))


def softmax_factor(s: np.ndarray, t: np.ndarray, y: int) -> float:
    return factor(*(-math.log(softmax(z)[y]) for z in (s, t)))


def sigmoid_distance(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    pairs = zip(sigmoid(t / temperature), sigmoid(s / temperature), strict=True)
    return temperature**2 * sum(binary_divergence(p, q) for p, q in pairs)


def softmax_distance(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    pairs = zip(softmax(t / temperature), softmax(s / temperature), strict=True)
    return temperature**2 * -sum(p * math.log(q) for p, q in pairs)


def sigmoid_row(s: np.ndarray, t: np.ndarray, y: int, alpha: float = 2.5, temperature: float = 2.0) -> float:
    return alpha * sigmoid_factor(s, t, y) * sigmoid_distance(s, t, temperature)


def softmax_row(s: np.ndarray, t: np.ndarray, y: int, alpha: float = 2.5, temperature: float = 2.0) -> float:
    return alpha * softmax_factor(s, t, y) * softmax_distance(s, t, temperature)


class WsldRowSuite(LabelledRowSuite):
    method = "wsld"
    factor: Callable[[np.ndarray, np.ndarray, int], float]
    distance: Callable[[np.ndarray, np.ndarray, float], float]

    def test_gradient_equals_finite_differences(self) -> None:
        """With the factor held: it gets no gradient, so the loss's own differences are others."""
        ours, theirs = self.student.numpy(), self.teacher.numpy()
        student = self.student.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(student, self.teacher), student)
        for row, c in np.ndindex(*ours.shape):
            step = np.eye(ours.shape[1])[c] * 1e-5
            up, down = (self.distance(ours[row] + change, theirs[row], 2.0) for change in (step, -step))
            held = self.factor(ours[row], theirs[row], int(self.extras[0][row]))
            expected = 2.5 * held * (up - down) / 2e-5 / len(ours)
            assert slope[row, c].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


class TestWsldSigmoid(WsldRowSuite):
    factor, distance = staticmethod(sigmoid_factor), staticmethod(sigmoid_distance)

    @staticmethod
    def call(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
        return wsld_loss(student, teacher, target, **options)


class TestWsldSoftmax(WsldRowSuite):
    at_identity = "stationary"
    factor, distance = staticmethod(softmax_factor), staticmethod(softmax_distance)

    @staticmethod
    def call(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
        return wsld_loss(student, teacher, target, protocol="softmax", **options)


class TestWsldModule(LabelledModuleSuite):
    method = "wsld"
    row = staticmethod(sigmoid_row)


@pytest.mark.parametrize("alpha", [2.5, 0.3])
@pytest.mark.parametrize("temperature", [2.0, 4.0])
@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_equals_the_formula(alpha: float, temperature: float, protocol: str) -> None:
    student, teacher, weight = numbers(6, 4, seed=0), numbers(6, 4, seed=1), np.abs(numbers(6, seed=2))
    row = sigmoid_row if protocol == "sigmoid" else softmax_row
    rows = zip(student, teacher, TARGET, weight, strict=True)
    expected = sum(w * row(s, t, y, alpha, temperature) for s, t, y, w in rows) / 7
    found = wsld_loss(
        *tensors(student, teacher),
        torch.tensor(TARGET),
        alpha=alpha,
        temperature=temperature,
        protocol=protocol,
        weight=torch.from_numpy(weight),
        normalizer=7.0,
    )
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_defaults_are_those_of_imagenet() -> None:
    student, teacher = numbers(6, 4, seed=0), numbers(6, 4, seed=1)
    rows = zip(student, teacher, TARGET, strict=True)
    expected = np.mean([sigmoid_row(s, t, y, 2.5, 2.0) for s, t, y in rows])
    assert wsld_loss(*tensors(student, teacher), torch.tensor(TARGET)).item() == pytest.approx(expected, rel=RTOL)


def test_softmax_by_hand() -> None:
    # The student loses log 2 on the label, the teacher log 4/3; even student: the cross-entropy is log 2.
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    loss = wsld_loss(torch.zeros_like(teacher), teacher, torch.tensor([0]), protocol="softmax")
    expected = 2.5 * 4 * (1 - math.exp(-math.log(2) / math.log(4 / 3))) * math.log(2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_sigmoid_by_hand() -> None:
    # One class: the student loses log 2 on it, the teacher log 4/3.
    teacher = torch.tensor([[math.log(3)]], dtype=torch.float64)
    loss = wsld_loss(torch.zeros_like(teacher), teacher, torch.tensor([0]), alpha=1.0, temperature=1.0)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.item() == pytest.approx((1 - math.exp(-math.log(2) / math.log(4 / 3))) * kl, rel=1e-6)


@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_factor_gets_no_gradient(protocol: str) -> None:
    """The gradient is KD's, times the factor: in softmax too, where the row is a cross-entropy."""
    student, teacher, target = draw(6, 4).requires_grad_(), draw(6, 4, seed=1), torch.tensor(TARGET)
    rule = sigmoid_factor if protocol == "sigmoid" else softmax_factor
    rows = zip(student.detach().numpy(), teacher.numpy(), TARGET, strict=True)
    factors = torch.tensor([rule(s, t, y) for s, t, y in rows], dtype=torch.float64)
    loss = wsld_loss(student, teacher, target, alpha=1.5, temperature=3.0, protocol=protocol, normalizer=1.0)
    plain = kd_loss(student, teacher, temperature=3.0, protocol=protocol, weight=1.5 * factors, normalizer=1.0)
    slopes = [torch.autograd.grad(value, student)[0] for value in (loss, plain)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_a_student_that_knows_the_label_is_left_alone(protocol: str) -> None:
    target = torch.tensor([0])
    right, wrong = (torch.tensor([[sign, -sign]]) for sign in (60.0, -60.0))
    assert wsld_loss(right, torch.zeros(1, 2), target, protocol=protocol).item() < 1e-6
    assert wsld_loss(wrong, right, target, protocol=protocol, alpha=1.0).item() == pytest.approx(
        kd_loss(wrong, right, protocol=protocol).item(), rel=1e-6
    )


def test_one_class() -> None:
    student, teacher, target = draw(5, 1).requires_grad_(), draw(5, 1, seed=1), torch.zeros(5, dtype=torch.int64)
    loss = wsld_loss(student, teacher, target)
    (slope,) = torch.autograd.grad(loss, student)
    assert loss > 1e-3 and slope.abs().min() > 1e-4
    constant = wsld_loss(student, teacher, target, protocol="softmax")
    (slope,) = torch.autograd.grad(constant, student)
    assert constant.item() == 0 and slope.abs().sum() == 0
