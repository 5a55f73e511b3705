"""NKD: the function by hand and against the formula of each protocol, the module against its rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import draw
from labelled_suite import LabelledModuleSuite, LabelledRowSuite
from reference_math import RTOL, cross_entropy, numbers, sigmoid, softmax, tensors
from torch import Tensor

from cache_kd.losses.nkd import nkd_loss

TARGET = [3, 0, 1, 2, 2, 0]


class TestNkdSigmoid(LabelledRowSuite):
    method = "nkd"
    at_identity = "stationary"

    @staticmethod
    def call(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
        return nkd_loss(student, teacher, target, temperature=2.0, **options)


class TestNkdSoftmax(LabelledRowSuite):
    method = "nkd"
    at_identity = "other"

    @staticmethod
    def call(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
        return nkd_loss(student, teacher, target, temperature=2.0, protocol="softmax", **options)


def sigmoid_row(s: np.ndarray, t: np.ndarray, y: int, gamma: float = 1.5, temperature: float = 1.0) -> float:
    own = cross_entropy(float(sigmoid(t[y])), float(sigmoid(s[y])))
    p, q = (np.delete(sigmoid(z / temperature), y) for z in (t, s))
    others = -sum(a * np.log(b) for a, b in zip(p / p.sum(), q / q.sum(), strict=True))
    return own + gamma * temperature**2 * float(others)


def softmax_row(s: np.ndarray, t: np.ndarray, y: int, gamma: float = 1.5, temperature: float = 1.0) -> float:
    own = -softmax(t)[y] * np.log(softmax(s)[y])
    p, q = (softmax(np.delete(z, y) / temperature) for z in (t, s))
    others = -sum(a * np.log(b) for a, b in zip(p, q, strict=True))
    return float(own + gamma * temperature**2 * others)


class TestNkdModule(LabelledModuleSuite):
    method = "nkd"
    row = staticmethod(sigmoid_row)


@pytest.mark.parametrize("gamma", [1.5, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_equals_the_formula(gamma: float, temperature: float, protocol: str) -> None:
    student, teacher, weight = numbers(6, 4, seed=0), numbers(6, 4, seed=1), np.abs(numbers(6, seed=2))
    row = sigmoid_row if protocol == "sigmoid" else softmax_row
    rows = zip(student, teacher, TARGET, weight, strict=True)
    expected = sum(w * row(s, t, y, gamma, temperature) for s, t, y, w in rows) / 7
    found = nkd_loss(
        *tensors(student, teacher),
        torch.tensor(TARGET),
        gamma=gamma,
        temperature=temperature,
        protocol=protocol,
        weight=torch.from_numpy(weight),
        normalizer=7.0,
    )
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_defaults_are_the_papers() -> None:
    student, teacher = numbers(6, 4, seed=0), numbers(6, 4, seed=1)
    expected = np.mean([sigmoid_row(s, t, y, 1.5, 1.0) for s, t, y in zip(student, teacher, TARGET, strict=True)])
    assert nkd_loss(*tensors(student, teacher), torch.tensor(TARGET)).item() == pytest.approx(expected, rel=RTOL)


def test_softmax_by_hand() -> None:
    # The teacher's softmax is (1/2, 3/8, 1/8), so 3/4 and 1/4 without the target; the student's is even.
    teacher = torch.tensor([[math.log(4), math.log(3), 0.0]])
    loss = nkd_loss(torch.zeros(1, 3), teacher, torch.tensor([0]), protocol="softmax")
    assert loss.item() == pytest.approx(0.5 * math.log(3) + 1.5 * math.log(2), rel=1e-6)


def test_sigmoid_by_hand() -> None:
    # σ of the teacher is 3/4 for the target and 2/3, 1/3 for the others; the student's are all 1/2.
    teacher = torch.tensor([[math.log(2), math.log(3), -math.log(2)]])
    loss = nkd_loss(torch.zeros(1, 3), teacher, torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(2) + 1.5 * math.log(2), rel=1e-6)
    shares = nkd_loss(teacher, teacher, torch.tensor([1]), gamma=1.0)
    entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (3 / 4, 2 / 3)]
    assert shares.item() == pytest.approx(sum(entropies), rel=1e-6)


@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_two_classes_leave_the_target_alone(protocol: str) -> None:
    student, teacher, target = draw(5, 2), draw(5, 2, seed=1), torch.tensor([0, 1, 0, 1, 1])
    student.requires_grad_()
    losses = [nkd_loss(student, teacher, target, gamma=gamma, protocol=protocol) for gamma in (0.0, 9.0)]
    assert losses[0] > 1e-3 and losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)


def test_one_class() -> None:
    student, teacher, target = draw(5, 1).requires_grad_(), draw(5, 1, seed=1), torch.zeros(5, dtype=torch.int64)
    loss = nkd_loss(student, teacher, target)
    pairs = zip(sigmoid(teacher.numpy()), sigmoid(student.detach().numpy()), strict=True)
    assert loss.item() == pytest.approx(np.mean([cross_entropy(p[0], q[0]) for p, q in pairs]), rel=RTOL)
    (slope,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(slope, (student.detach().sigmoid() - teacher.sigmoid()) / 5)
    constant = nkd_loss(student, teacher, target, protocol="softmax")
    (slope,) = torch.autograd.grad(constant, student)
    assert constant.item() == 0 and slope.abs().sum() == 0
