"""KD: the function by hand and against its formula in both protocols, the module against its divisor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import RowSuite, draw
from reference_math import (
    RTOL,
    binary_divergence,
    chosen_anchors,
    divergence,
    logits,
    numbers,
    sigmoid,
    softmax,
    tensors,
)
from torch import Tensor

from cache_kd.errors import SettingError
from cache_kd.losses import build_loss, parse_loss
from cache_kd.losses.kd import KD, kd_loss


class TestKdSigmoid(RowSuite):
    student, teacher = draw(5, 3), draw(5, 3, seed=1)
    without_normalizer = "mean"

    @staticmethod
    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return kd_loss(student, teacher, temperature=2.0, **options)


class TestKdSoftmax(RowSuite):
    student, teacher = draw(5, 3), draw(5, 3, seed=1)
    without_normalizer = "mean"

    @staticmethod
    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return kd_loss(student, teacher, temperature=2.0, protocol="softmax", **options)


def test_by_hand() -> None:
    # σ(log 3) = 3/4 against σ(0) = 1/2, one class; softmax of (log 3, 0) is the same pair of numbers.
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    one = kd_loss(torch.zeros(1, 1), torch.tensor([[math.log(3)]]), temperature=1.0)
    assert one.item() == pytest.approx(expected, rel=1e-6)
    two = kd_loss(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), temperature=1.0, protocol="softmax")
    assert two.item() == pytest.approx(expected, rel=1e-6)
    hot = kd_loss(torch.zeros(1, 1), torch.tensor([[2 * math.log(3)]]), temperature=2.0)
    assert hot.item() == pytest.approx(4 * expected, rel=1e-6)


def test_default_temperature_is_that_of_detectors_code() -> None:
    student, teacher = TestKdSigmoid.student, TestKdSigmoid.teacher
    assert kd_loss(student, teacher).item() == kd_loss(student, teacher, temperature=2.0).item()


def test_gradient_is_temperature_times_the_gap() -> None:
    student, teacher = TestKdSigmoid.student.clone().requires_grad_(), TestKdSigmoid.teacher
    kd_loss(student, teacher, temperature=3.0, normalizer=1.0).backward()
    expected = 3 * ((student.detach() / 3).sigmoid() - (teacher / 3).sigmoid())
    torch.testing.assert_close(student.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_keeps_the_scale_of_small_gradients(temperature: float) -> None:
    """T² is there so that near the teacher the gradient hardly depends on T."""
    teacher = draw(4, 6) * 1e-3

    def slope(temperature: float) -> float:
        student = torch.zeros_like(teacher).requires_grad_()
        loss = kd_loss(student, teacher, temperature=temperature, protocol="softmax")
        return float(torch.autograd.grad(loss, student)[0].norm())

    assert slope(temperature) == pytest.approx(slope(1.0), 1e-2)


def test_softmax_does_not_see_a_common_shift_and_sigmoid_does() -> None:
    student = TestKdSoftmax.student
    assert TestKdSoftmax.call(student + 3, student).item() == pytest.approx(0, abs=1e-12)
    assert TestKdSigmoid.call(student + 3, student) > 0.1


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(SettingError, match=r"no protocol 'softmx'; known: sigmoid, softmax; did you mean 'softmax'\?"):
        kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=1.0, protocol="softmx")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_equals_the_formula(temperature: float, protocol: str) -> None:
    student, teacher, weight = numbers(6, 4, seed=0), numbers(6, 4, seed=1), np.abs(numbers(6, seed=2))
    total = 0.0
    for s, t, w in zip(student / temperature, teacher / temperature, weight, strict=True):
        if protocol == "sigmoid":
            row = sum(binary_divergence(p, q) for p, q in zip(sigmoid(t), sigmoid(s), strict=True))
        else:
            row = divergence(softmax(t), softmax(s))
        total += w * row * temperature**2
    found = kd_loss(
        *tensors(student, teacher),
        temperature=temperature,
        protocol=protocol,
        weight=torch.from_numpy(weight),
        normalizer=7.0,
    )
    assert found.item() == pytest.approx(total / 7, rel=RTOL)


def test_module(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64)
    _, _, total = chosen_anchors(case)
    ours, theirs, _, _ = logits(case)
    values = zip(sigmoid(theirs).ravel(), sigmoid(ours).ravel(), strict=True)
    expected = sum(binary_divergence(p, q) for p, q in values) / total
    assert KD(case.teacher, case.student)(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


def test_nearly_empty_batches_are_divided_by_one(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64)
    targets = replace(case.targets, scores=case.targets.scores.detach() - 15)
    ours, theirs = case.output.scores.detach().numpy(), targets.scores.numpy()
    expected = sum(binary_divergence(p, q) for p, q in zip(sigmoid(theirs).flat, sigmoid(ours).flat, strict=True))
    assert KD(case.teacher, case.student)(case.output, targets).item() == pytest.approx(expected, rel=RTOL)


def test_softmax_with_one_class_is_refused(make_case: Callable[..., Any]) -> None:
    case = make_case(classes=1)
    with pytest.raises(
        SettingError, match=r"protocol=softmax with one class is constantly zero; allowed here: sigmoid"
    ):
        build_loss(parse_loss("kd:protocol=softmax"), case.teacher, case.student)
