"""PA: the function by hand, against its formula and its detached norm; the grid it refuses; the module sums levels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors
from torch import Tensor

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses import build_loss, parse_loss
from cache_kd.losses.pa import PA, pa_loss


def nodes(image: np.ndarray, scale: float) -> list[np.ndarray]:
    """Largest value of each channel in each patch of one image (F, H, W)."""
    _, height, width = image.shape
    rows, columns = max(int(height * scale), 1), max(int(width * scale), 1)
    return [
        np.array([channel[y : y + rows, x : x + columns].max() for channel in image])
        for y in range(0, height, rows)
        for x in range(0, width, columns)
    ]


def lengths(image: np.ndarray, scale: float) -> list[float]:
    return [math.sqrt(sum(value**2 for value in node)) + 1e-8 for node in nodes(image, scale)]


def similarities(image: np.ndarray, scale: float, norms: list[float]) -> np.ndarray:
    units = [node / norm for node, norm in zip(nodes(image, scale), norms, strict=True)]
    return np.array([[sum(p * q for p, q in zip(a, b, strict=True)) for b in units] for a in units])


def reference(
    student: np.ndarray, teacher: np.ndarray, scale: float = 0.5, norms: list[list[float]] | None = None
) -> float:
    """The formula; `norms` holds the student's norms, one list an image, when they are to be taken as constants."""
    norms = norms or [lengths(image, scale) for image in student]
    total = 0.0
    for ours, theirs, constant in zip(student, teacher, norms, strict=True):
        a, b = similarities(ours, scale, constant), similarities(theirs, scale, lengths(theirs, scale))
        total += sum((q - p) ** 2 for q, p in zip(a.ravel(), b.ravel(), strict=True)) / len(a) ** 2
    return total / len(student)


def slopes(student: np.ndarray, teacher: np.ndarray, norms: list[list[float]] | None) -> np.ndarray:
    """Central differences of `reference` in every value of the student's maps."""
    found = np.zeros_like(student)
    step = 1e-6
    for place in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[place] += step
        down[place] -= step
        found[place] = (reference(up, teacher, norms=norms) - reference(down, teacher, norms=norms)) / (2 * step)
    return found


def gradient(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    ours, theirs = tensors(student, teacher)
    pa_loss(ours.requires_grad_(), theirs).backward()
    assert ours.grad is not None
    return ours.grad.numpy()


class TestPa(FunctionSuite):
    call = staticmethod(pa_loss)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)

    def test_gradient_equals_finite_differences(self) -> None:
        """Of the loss whose norms stay what they are at this point."""
        student, teacher = self.student.numpy(), self.teacher.numpy()
        norms = [lengths(image, 0.5) for image in student]
        np.testing.assert_allclose(gradient(student, teacher), slopes(student, teacher, norms), atol=1e-8, rtol=1e-6)


def test_gradient_is_not_that_of_a_cosine() -> None:
    student, teacher = numbers(1, 3, 4, 4, seed=0), numbers(1, 3, 4, 4, seed=1)
    ours, cosine = gradient(student, teacher), slopes(student, teacher, None)
    assert np.abs(ours - cosine).max() > 0.1 * np.abs(cosine).max()
    # A cosine does not change with a node's length, so that its gradient is at right angles to the node.
    pooled = tensors(student)[0].requires_grad_()
    pa_loss(pooled, tensors(teacher)[0]).backward()
    assert pooled.grad is not None
    assert (pooled * pooled.grad).sum().abs() > 1e-3
    assert abs((student * cosine).sum()) < 1e-8


@pytest.mark.parametrize("grid", [(3, 5), (8, 8), (5, 2), (1, 2), (7, 6)])
@pytest.mark.parametrize("channels", [(3, 3), (2, 5)])
@pytest.mark.parametrize("scale", [0.2, 0.5, 0.7])
def test_equals_its_formula(scale: float, channels: tuple[int, int], grid: tuple[int, int]) -> None:
    student, teacher = numbers(2, channels[0], *grid, seed=0), numbers(2, channels[1], *grid, seed=1)
    expected = reference(student, teacher, scale)
    assert pa_loss(*tensors(student, teacher), scale=scale).item() == pytest.approx(expected, rel=RTOL)


def test_by_hand() -> None:
    # Four nodes of one cell, (1, 0) thrice and (0, 2) once: 3 of 6 pairs, that is 6 of 16 entries, are 0, not 1.
    student = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]]).double().view(1, 2, 2, 2)
    assert pa_loss(student, torch.ones(1, 3, 2, 2).double()).item() == pytest.approx(6 / 16, rel=1e-6)


def test_default_leaves_two_by_two_nodes() -> None:
    """A value that is not the largest of its quarter does not count."""
    student, teacher = draw(1, 3, 8, 8), draw(1, 3, 8, 8, seed=1)
    four = torch.nn.functional.max_pool2d(student, 4)
    assert four.shape[2:] == (2, 2)
    assert pa_loss(four.repeat_interleave(4, 2).repeat_interleave(4, 3), teacher) == pa_loss(student, teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nodes_of_zeros_get_no_gradient(dtype: torch.dtype) -> None:
    student, teacher = draw(1, 3, 4, 4).to(dtype), draw(1, 3, 4, 4, seed=1).to(dtype)
    student[..., :2, :2] = 0
    student.requires_grad_()
    loss = pa_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.abs().max() < 10
    assert student.grad.abs().max() > 1e-3
    assert student.grad[..., :2, :2].abs().max() == 0
    assert loss.item() == pytest.approx(
        reference(student.detach().double().numpy(), teacher.double().numpy()), rel=1e-5
    )


def test_one_node_and_no_image() -> None:
    for shape in ((2, 3, 1, 1), (0, 3, 4, 4)):
        student = draw(*shape).requires_grad_()
        loss = pa_loss(student, draw(*shape, seed=1))
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 0.0125, 0.024])
def test_grid_of_more_than_400_nodes_is_refused(scale: float) -> None:
    with pytest.raises(SettingError, match=r"scale=.* leaves 6400 nodes of a 80x80 map.*at most 400 nodes, scale from"):
        pa_loss(torch.zeros(1, 1, 80, 80), torch.zeros(1, 1, 80, 80), scale=scale)


@pytest.mark.parametrize("grid", [(80, 80), (39, 39), (48, 80), (21, 37)])
def test_scale_that_the_refusal_names_works_and_a_smaller_one_does_not(grid: tuple[int, int]) -> None:
    maps = torch.zeros(1, 1, *grid)
    with pytest.raises(SettingError, match="scale from") as refusal:
        pa_loss(maps, maps, scale=0.0)
    named = float(str(refusal.value).split("scale from ")[1].split()[0])
    assert pa_loss(maps, maps, scale=named) == 0
    with pytest.raises(SettingError, match="at most 400 nodes"):
        pa_loss(maps, maps, scale=named - 0.001)


def test_400_nodes_are_allowed() -> None:
    maps = torch.zeros(1, 1, 20, 20)
    assert pa_loss(maps, maps, scale=0.05) == 0


@pytest.mark.parametrize("shape", [(1, 3, 3, 5), (2, 3, 5, 3), (2, 3, 15)])
def test_unequal_maps_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match=r"student \(2, 3, 3, 5\) and teacher .* one shape, channels excepted"):
        pa_loss(draw(2, 3, 3, 5), draw(*shape))


@pytest.mark.parametrize("text", ["0.01", "0.96", "1", "-1", "nan"])
def test_scale_out_of_range_is_refused(text: str, make_case: Any) -> None:
    case = make_case()
    with pytest.raises(SettingError, match=r"scale=.* is not allowed; allowed: finite numbers from 0.05 to 0.95"):
        build_loss(parse_loss(f"pa:scale={text}"), case.teacher, case.student)


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_module_sums_levels_and_trains_nothing(scale: float, make_case: Any) -> None:
    case = make_case(dtype=torch.float64)
    loss = PA(case.teacher, case.student, scale=scale)
    pairs = zip(case.output.features, case.targets.features, strict=True)
    expected = [reference(ours.detach().numpy(), theirs.detach().numpy(), scale) for ours, theirs in pairs]
    assert loss(case.output, case.targets).item() == pytest.approx(sum(expected), rel=RTOL)
    assert list(loss.parameters()) == []


def test_module_takes_half_of_each_side_by_default(make_case: Any) -> None:
    case = make_case(dtype=torch.float64)
    losses: list[Tensor] = [
        method(case.output, case.targets)
        for method in (PA(case.teacher, case.student), PA(case.teacher, case.student, scale=0.5))
    ]
    assert losses[0] == losses[1]
