"""AT: the function by hand and against its formula; the module sums levels of any channels and trains nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors

from cache_kd.errors import MismatchError
from cache_kd.losses.at import AT, at_loss


class TestAt(FunctionSuite):
    call = staticmethod(at_loss)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)


def attention(image: np.ndarray) -> np.ndarray:
    channels, height, width = image.shape
    energy = np.zeros((height, width))
    for c in range(channels):
        energy += image[c] ** 2 / channels
    length = math.sqrt(sum(value**2 for value in energy.ravel()))
    return energy / length


def reference(student: np.ndarray, teacher: np.ndarray) -> float:
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for q, p in zip(attention(ours).ravel(), attention(theirs).ravel(), strict=True):
            total += (q - p) ** 2
    return total / (student.shape[0] * student.shape[2] * student.shape[3])


@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (4, 4)])
@pytest.mark.parametrize("channels", [(3, 3), (2, 5)])
def test_equals_its_formula(channels: tuple[int, int], grid: tuple[int, int]) -> None:
    student, teacher = numbers(2, channels[0], *grid, seed=0), numbers(2, channels[1], *grid, seed=1)
    assert at_loss(*tensors(student, teacher)).item() == pytest.approx(reference(student, teacher), rel=RTOL)


def test_by_hand() -> None:
    # Energies (9, 16)·k against (1, 0): Q = (9, 16)/√337 and (1, 0).
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, -4.0]]]]).double()
    teacher = torch.tensor([[[[7.0, 0.0]]]]).double()
    root = math.sqrt(337)
    assert at_loss(student, teacher).item() == pytest.approx(((9 / root - 1) ** 2 + (16 / root) ** 2) / 2, rel=1e-12)


def test_signs_channels_and_scale_of_an_image_do_not_count() -> None:
    teacher = draw(2, 3, 3, 5)
    alike = -7 * teacher.flip(1) * torch.tensor([1.0, 0.01]).view(2, 1, 1, 1)
    assert at_loss(alike, teacher).item() == pytest.approx(0, abs=1e-15)
    assert at_loss(teacher.repeat(1, 2, 1, 1), teacher).item() == pytest.approx(0, abs=1e-15)
    assert at_loss(teacher.flip(3), teacher) > 1e-3


def test_value_falls_with_the_number_of_cells() -> None:
    # The same picture, every cell four times: Q is halved, so are differences, and the mean is over as many cells.
    student, teacher = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1)
    fine = [m.repeat_interleave(2, 2).repeat_interleave(2, 3) for m in (student, teacher)]
    assert at_loss(*fine).item() == pytest.approx(at_loss(student, teacher).item() / 4, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-12])
def test_empty_energy_stays_finite(size: float, dtype: torch.dtype) -> None:
    student = torch.full((2, 3, 3, 5), size, dtype=dtype, requires_grad=True)
    teacher = draw(2, 3, 3, 5).to(dtype)
    loss = at_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().max() < 1e3
    assert at_loss(teacher, torch.zeros_like(teacher)).isfinite()


def test_no_images_give_a_differentiable_zero() -> None:
    student = torch.zeros(0, 3, 3, 5, requires_grad=True)
    loss = at_loss(student, torch.zeros(0, 4, 3, 5))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


@pytest.mark.parametrize("shape", [(1, 3, 3, 5), (2, 3, 5, 3), (2, 3, 3, 4), (2, 3, 15)])
def test_unequal_maps_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match=r"student \(2, 3, 3, 5\) and teacher .* one shape, channels excepted"):
        at_loss(draw(2, 3, 3, 5), draw(*shape))


def test_module_sums_levels_and_trains_nothing(make_case: Any) -> None:
    case = make_case(dtype=torch.float64)
    loss = AT(case.teacher, case.student)
    pairs = zip(case.output.features, case.targets.features, strict=True)
    expected = [reference(ours.detach().numpy(), theirs.detach().numpy()) for ours, theirs in pairs]
    assert loss(case.output, case.targets).item() == pytest.approx(sum(expected), rel=RTOL)
    assert list(loss.parameters()) == []


def test_module_compares_the_layers_named(make_case: Any) -> None:
    case = make_case(dtype=torch.float64)
    loss = AT(case.teacher, case.student, layers=("P5", "P3"))
    expected = sum(
        reference(case.output.features[level].detach().numpy(), case.targets.features[level].detach().numpy())
        for level in (2, 0)
    )
    assert loss(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)
