"""FSP: the function by hand and against its formula, its pooling and reductions; the module pairs layers in a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors
from torch import Tensor, nn

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses import build_loss, parse_loss
from cache_kd.losses.fsp import FSP, fsp_loss


def two_layers(maps: Tensor) -> tuple[Tensor, Tensor]:
    return maps[:, :2], maps[:, 2:, :2, :2]


class TestFspOfWholeWindows(FunctionSuite):
    student, teacher = draw(2, 5, 4, 6), draw(2, 5, 4, 6, seed=1)

    @staticmethod
    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return fsp_loss(two_layers(student), two_layers(teacher))


class TestFspMean(FunctionSuite):
    student, teacher = draw(2, 5, 4, 6), draw(2, 5, 4, 6, seed=1)

    @staticmethod
    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return fsp_loss(two_layers(student), two_layers(teacher), reduction="mean")


class TestFspOfOddSizes(FunctionSuite):
    student, teacher = draw(2, 5, 5, 7), draw(2, 5, 5, 7, seed=1)

    @staticmethod
    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return fsp_loss(two_layers(student), two_layers(teacher))


def pooled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Largest values of the windows from floor(i·H/h) to ceil((i + 1)·H/h), the whole blocks where h divides H."""
    channels, rows, columns = image.shape
    found = np.zeros((channels, height, width))
    for c, y, x in np.ndindex(found.shape):
        ys = slice(y * rows // height, -(-(y + 1) * rows // height))
        xs = slice(x * columns // width, -(-(x + 1) * columns // width))
        found[c, y, x] = image[c, ys, xs].max()
    return found


def flow(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """G of one image."""
    size = (min(low.shape[1], high.shape[1]), min(low.shape[2], high.shape[2]))
    low, high = pooled(low, *size), pooled(high, *size)
    found = np.zeros((len(low), len(high)))
    for a, b in np.ndindex(found.shape):
        for place in np.ndindex(size):
            found[a, b] += low[(a, *place)] * high[(b, *place)] / (size[0] * size[1])
    return found


def reference(student: tuple[np.ndarray, ...], teacher: tuple[np.ndarray, ...], reduction: str = "sum") -> float:
    total = 0.0
    images = len(student[0])
    for n in range(images):
        ours, theirs = flow(student[0][n], student[1][n]), flow(teacher[0][n], teacher[1][n])
        square = sum((q - p) ** 2 for q, p in zip(ours.ravel(), theirs.ravel(), strict=True))
        total += square / (ours.size if reduction == "mean" else 1)
    return total / images


def layers(low: tuple[int, int], high: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    return numbers(2, 2, *low, seed=seed), numbers(2, 3, *high, seed=seed + 10)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("low", "high"),
    [((4, 6), (2, 3)), ((2, 3), (4, 6)), ((5, 7), (3, 4)), ((3, 4), (1, 2)), ((4, 4), (4, 4)), ((6, 3), (2, 5))],
)
def test_equals_its_formula(low: tuple[int, int], high: tuple[int, int], reduction: str) -> None:
    student, teacher = layers(low, high, 0), layers(low, high, 1)
    ours, theirs = tensors(*student), tensors(*teacher)
    found = fsp_loss((ours[0], ours[1]), (theirs[0], theirs[1]), reduction=reduction)
    assert found.item() == pytest.approx(reference(student, teacher, reduction), rel=RTOL)


def test_by_hand() -> None:
    # Pooled to one cell: X = (3, -1), Y = 2, G = (6, -2) against 0. Squares 36 + 4.
    low = torch.tensor([[3.0, 0.0], [-1.0, -5.0]]).double().view(1, 2, 1, 2)
    high = torch.full((1, 1, 1, 1), 2.0).double()
    nothing = (torch.zeros_like(low), high)
    assert fsp_loss((low, high), nothing).item() == pytest.approx(40, rel=1e-12)
    assert fsp_loss((low, high), nothing, reduction="mean").item() == pytest.approx(20, rel=1e-12)


def test_default_is_the_sum_and_images_are_averaged() -> None:
    student, teacher = two_layers(draw(2, 5, 4, 6)), two_layers(draw(2, 5, 4, 6, seed=1))
    once = fsp_loss(student, teacher)
    assert once == fsp_loss(student, teacher, reduction="sum")
    assert once.item() == pytest.approx(6 * fsp_loss(student, teacher, reduction="mean").item(), rel=1e-12)
    twice = fsp_loss(tuple(m.repeat(2, 1, 1, 1) for m in student), tuple(m.repeat(2, 1, 1, 1) for m in teacher))
    assert twice.item() == pytest.approx(once.item(), rel=1e-12)


def test_whole_windows_are_pooled_by_an_ordinary_max_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = two_layers(draw(2, 5, 4, 6)), two_layers(draw(2, 5, 4, 6, seed=1))
    by_hand = [(F.max_pool2d(low, (2, 3)), high) for low, high in (student, teacher)]
    expected = fsp_loss(*by_hand)
    monkeypatch.delattr(F, "adaptive_max_pool2d")
    assert fsp_loss(student, teacher) == expected


def test_no_images_give_a_differentiable_zero() -> None:
    low, high = torch.zeros(0, 2, 4, 6, requires_grad=True), torch.zeros(0, 3, 2, 3, requires_grad=True)
    loss = fsp_loss((low, high), (torch.zeros(0, 2, 4, 6), torch.zeros(0, 3, 2, 3)))
    loss.backward()
    assert loss.item() == 0 and low.grad is not None and high.grad is not None


def test_gradient_reaches_both_layers_of_the_student_alone() -> None:
    student, teacher = (
        [m.clone().requires_grad_() for m in two_layers(draw(2, 5, 4, 6, seed=seed))] for seed in (0, 1)
    )
    fsp_loss((student[0], student[1]), (teacher[0], teacher[1])).backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 1e-3 for m in student)
    assert all(m.grad is None for m in teacher)


def test_wrong_arguments_are_refused() -> None:
    student = two_layers(draw(2, 5, 4, 6))
    with pytest.raises(MismatchError, match=r"student \(2, 3, 2, 2\) and teacher \(2, 2, 2, 2\) must be of one shape"):
        fsp_loss(student, (student[0], student[1][:, :2]))
    alone = (student[0], student[1][:1])
    with pytest.raises(MismatchError, match="maps of 2 and 1 images; allowed: layers of the same images"):
        fsp_loss(alone, alone)
    with pytest.raises(SettingError, match="reduction='none' is not allowed; allowed: sum, mean"):
        fsp_loss(student, student, reduction="none")


def adapted(loss: FSP, case: Any, names: tuple[int, ...] = (0, 1, 2)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    ours = []
    for adapter, level in zip(loss.adapters, names, strict=True):
        maps = case.output.features[level].detach().numpy()
        if isinstance(adapter, nn.Conv2d):
            assert adapter.bias is not None
            maps = np.einsum("ab,nbhw->nahw", adapter.weight.detach().numpy()[:, :, 0, 0], maps)
            maps = maps + adapter.bias.detach().numpy().reshape(1, -1, 1, 1)
        ours.append(maps)
    return ours, [case.targets.features[level].detach().numpy() for level in names]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_module_pairs_each_level_with_the_next(reduction: str, make_case: Any) -> None:
    case = make_case(dtype=torch.float64)
    loss = FSP(case.teacher, case.student, reduction=reduction).double()
    assert [type(adapter) for adapter in loss.adapters] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    s, t = adapted(loss, case)
    expected = reference((s[0], s[1]), (t[0], t[1]), reduction) + reference((s[1], s[2]), (t[1], t[2]), reduction)
    assert loss(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


def test_module_pairs_the_layers_named_in_their_order(make_case: Any) -> None:
    case = make_case(dtype=torch.float64)
    loss = FSP(case.teacher, case.student, layers=("P3", "P5")).double()
    s, t = adapted(loss, case, (0, 2))
    expected = reference((s[0], s[1]), (t[0], t[1]))
    assert loss(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


def test_one_layer_is_refused(make_case: Any) -> None:
    case = make_case()
    with pytest.raises(SettingError, match=r"got layers P4; allowed: two layers or more, for example fsp:layers=P3,P4"):
        build_loss(parse_loss("fsp:layers=P4"), case.teacher, case.student)
    build_loss(parse_loss("fsp:layers=P3,P4"), case.teacher, case.student)


def test_another_reduction_is_refused(make_case: Any) -> None:
    case = make_case()
    with pytest.raises(SettingError, match="loss fsp: reduction=max is not allowed; allowed: sum, mean"):
        build_loss(parse_loss("fsp:reduction=max"), case.teacher, case.student)
