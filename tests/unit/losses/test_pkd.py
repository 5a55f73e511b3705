"""PKD: the function by hand, against its formula and Pearson's correlation; the module's adapters have no bias."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors
from torch import nn

from cache_kd.losses.pkd import PKD, pkd_loss


class TestPkd(FunctionSuite):
    call = staticmethod(pkd_loss)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)


def standard(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return [(value - mean) / (deviation + 1e-6) for value in values]


def reference(student: np.ndarray, teacher: np.ndarray) -> float:
    total = 0.0
    for c in range(student.shape[1]):
        ours, theirs = (standard([float(v) for v in maps[:, c].ravel()]) for maps in (student, teacher))
        total += sum((q - p) ** 2 for q, p in zip(ours, theirs, strict=True))
    return total / student.size / 2


@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (1, 4, 1, 7), (3, 1, 2, 2), (2, 2, 1, 1)])
def test_equals_its_formula(shape: tuple[int, ...]) -> None:
    student, teacher = numbers(*shape, seed=0), numbers(*shape, seed=1)
    assert pkd_loss(*tensors(student, teacher)).item() == pytest.approx(reference(student, teacher), rel=RTOL)


def test_by_hand() -> None:
    # z of (0, 2, 4) is (-1, 0, 1), of (3, 1, 2) it is (1, -1, 0): squares 4, 1, 1.
    student, teacher = torch.tensor([0.0, 2.0, 4.0]).double(), torch.tensor([3.0, 1.0, 2.0]).double()
    assert pkd_loss(student.view(1, 1, 1, 3), teacher.view(1, 1, 1, 3)).item() == pytest.approx(1, rel=1e-5)


def test_is_one_less_the_correlation_up_to_the_unbiased_deviation() -> None:
    student, teacher = numbers(2, 3, 3, 5, seed=0), numbers(2, 3, 3, 5, seed=1)
    cells = 2 * 3 * 5
    r = [np.corrcoef(student[:, c].ravel(), teacher[:, c].ravel())[0, 1] for c in range(3)]
    expected = (cells - 1) / cells * (1 - np.mean(r))
    assert pkd_loss(*tensors(student, teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_scale_and_offset_of_a_channel_do_not_count_but_its_sign_does() -> None:
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)
    scale, offset = torch.tensor([0.5, 3.0, 40.0]).view(1, 3, 1, 1), torch.tensor([7.0, -1.0, 0.2]).view(1, 3, 1, 1)
    plain = pkd_loss(student, teacher).item()
    assert pkd_loss(student * scale + offset, teacher).item() == pytest.approx(plain, rel=1e-5)
    assert pkd_loss(student, teacher * scale + offset).item() == pytest.approx(plain, rel=1e-5)
    assert pkd_loss(teacher * scale + offset, teacher).item() == pytest.approx(0, abs=1e-9)
    assert pkd_loss(-teacher, teacher).item() == pytest.approx(2 * 29 / 30, rel=1e-5)


def test_statistics_are_those_of_the_batch() -> None:
    """An offset of one image alone counts, as it would not if each image were normalised by itself."""
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)
    moved = student + torch.tensor([5.0, 0.0]).view(2, 1, 1, 1)
    assert (pkd_loss(moved, teacher) - pkd_loss(student, teacher)).abs() > 1e-2


def test_repeating_the_batch_changes_the_unbiased_factor_only() -> None:
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)
    once, twice = pkd_loss(student, teacher), pkd_loss(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))
    assert twice.item() == pytest.approx(once.item() * (59 / 60) / (29 / 30), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_channel_stays_finite(dtype: torch.dtype) -> None:
    student, teacher = draw(2, 3, 3, 5).to(dtype), draw(2, 3, 3, 5, seed=1).to(dtype)
    flat = student.clone()
    flat[:, 1] = 0.5
    flat.requires_grad_()
    loss = pkd_loss(flat, teacher)
    loss.backward()
    # The others as ever, and for this one ½ · (cells − 1) / cells.
    others = 2 / 3 * pkd_loss(student[:, ::2], teacher[:, ::2])
    assert loss.item() == pytest.approx(others.item() + 29 / 30 / 6, rel=1e-5)
    assert flat.grad is not None and flat.grad.isfinite().all()
    assert pkd_loss(student, flat.detach()).isfinite()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (0, 3, 4, 4)])
def test_one_cell_or_none_gives_a_differentiable_zero(shape: tuple[int, ...]) -> None:
    student = draw(*shape).requires_grad_()
    loss = pkd_loss(student, draw(*shape, seed=1))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and student.grad.isfinite().all()


def test_module_adapts_without_bias_where_channels_differ_and_sums_levels(make_case: Any) -> None:
    case = make_case(dtype=torch.float64)
    loss = PKD(case.teacher, case.student).double()
    assert [type(adapter) for adapter in loss.adapters] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    assert [key for key, _ in loss.named_parameters()] == ["adapters.0.weight", "adapters.2.weight"]
    expected = 0.0
    for adapter, ours, theirs in zip(loss.adapters, case.output.features, case.targets.features, strict=True):
        maps = ours.detach().numpy()
        if isinstance(adapter, nn.Conv2d):
            maps = np.einsum("ab,nbhw->nahw", adapter.weight.detach().numpy()[:, :, 0, 0], maps)
        expected += reference(maps, theirs.detach().numpy())
    assert loss(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)
