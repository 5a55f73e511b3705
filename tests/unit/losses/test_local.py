"""LOCAL: the function by hand and against its formula over every cell and neighbour; the module sums levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors

from cache_kd.errors import MismatchError
from cache_kd.losses.local import LOCAL, local_loss


class TestLocal(FunctionSuite):
    call = staticmethod(local_loss)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b) / (np.sqrt(np.sum(a * a)) * np.sqrt(np.sum(b * b))))


def reference(student: np.ndarray, teacher: np.ndarray) -> float:
    """Mean over images and ordered pairs: every cell with each of its neighbours."""
    images, _, height, width = student.shape
    found = []
    for n in range(images):
        for y in range(height):
            for x in range(width):
                for v in range(max(y - 1, 0), min(y + 2, height)):
                    for u in range(max(x - 1, 0), min(x + 2, width)):
                        if (v, u) != (y, x):
                            ours = cosine(student[n, :, y, x], student[n, :, v, u])
                            theirs = cosine(teacher[n, :, y, x], teacher[n, :, v, u])
                            found.append((theirs - ours) ** 2)
    return float(np.mean(found))


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("channels", [(3, 3), (2, 5)])
def test_equals_its_formula(channels: tuple[int, int], grid: tuple[int, int]) -> None:
    student, teacher = numbers(2, channels[0], *grid, seed=0), numbers(2, channels[1], *grid, seed=1)
    assert local_loss(*tensors(student, teacher)).item() == pytest.approx(reference(student, teacher), rel=RTOL)


def test_by_hand() -> None:
    # Cells (1, 0), (0, 1), (1, 1): cosines 0 and √½, against 1 and 1 of a flat map.
    student = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).double().view(1, 2, 1, 3)
    teacher = torch.ones(1, 4, 1, 3).double()
    assert local_loss(student, teacher).item() == pytest.approx((1 + (1 - 0.5**0.5) ** 2) / 2, rel=1e-12)


def test_scale_of_a_cell_and_a_rotation_of_channels_do_not_count() -> None:
    teacher = draw(2, 3, 3, 5)
    turn, _ = torch.linalg.qr(draw(3, 3, seed=5))
    alike = torch.einsum("ab,nbhw->nahw", turn, teacher) * draw(2, 1, 3, 5, seed=2).exp()
    assert local_loss(alike, teacher).item() == pytest.approx(0, abs=1e-15)


def test_only_neighbours_are_compared() -> None:
    # One cell of the teacher is another: the pairs that differ are those of this cell with its three neighbours.
    student = draw(1, 3, 5, 5).requires_grad_()
    teacher = student.detach().clone()
    teacher[..., 0, 0] = draw(1, 3, seed=3)
    local_loss(student, teacher).backward()
    assert student.grad is not None
    moved = student.grad.abs().sum(1)[0] > 1e-9
    assert moved.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cells", ["one", "all"])
def test_cells_of_zeros_have_no_similarity_and_no_gradient(cells: str, dtype: torch.dtype) -> None:
    student, teacher = draw(1, 3, 3, 3).to(dtype), draw(1, 3, 3, 3, seed=1).to(dtype)
    dark = torch.zeros(3, 3, dtype=torch.bool)
    dark[1, 1] = True
    dark |= cells == "all"
    student[:, :, dark] = 0
    student.requires_grad_()
    loss = local_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert student.grad is not None and student.grad.isfinite().all()
    assert student.grad[:, :, dark].abs().max() == 0
    assert cells == "all" or student.grad.abs().max() > 1e-3
    assert local_loss(teacher, student).isfinite()


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (0, 3, 4, 4)])
def test_no_neighbours_give_a_differentiable_zero(shape: tuple[int, ...]) -> None:
    student = draw(*shape).requires_grad_()
    loss = local_loss(student, draw(*shape, seed=1))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("shape", [(1, 3, 3, 5), (2, 3, 5, 3), (2, 3, 15)])
def test_unequal_maps_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match=r"student \(2, 3, 3, 5\) and teacher .* one shape, channels excepted"):
        local_loss(draw(2, 3, 3, 5), draw(*shape))


def test_module_sums_levels_and_trains_nothing(make_case: Any) -> None:
    case = make_case(dtype=torch.float64)
    loss = LOCAL(case.teacher, case.student)
    pairs = zip(case.output.features, case.targets.features, strict=True)
    expected = [reference(ours.detach().numpy(), theirs.detach().numpy()) for ours, theirs in pairs]
    assert loss(case.output, case.targets).item() == pytest.approx(sum(expected), rel=RTOL)
    assert list(loss.parameters()) == []
