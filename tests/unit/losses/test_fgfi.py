"""FGFI: the loss and its mask by hand and written out as loops, and the module's adapters and boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors
from torch import Tensor, nn

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses import fgfi
from cache_kd.losses.fgfi import FGFI, fgfi_loss, fgfi_mask

Cases = Callable[..., Any]
MASK = draw(2, 1, 3, 5, seed=7) > 0


class TestFgfi(FunctionSuite):
    call = staticmethod(fgfi_loss)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)
    extras = (MASK,)


def test_by_hand() -> None:
    student, teacher = torch.tensor([[[[3.0, 5.0, 0.0]]]]), torch.tensor([[[[1.0, 2.0, 9.0]]]])
    mask = torch.tensor([[[[1, 1, 0]]]])
    assert fgfi_loss(student, teacher, mask).item() == (4 + 9) / (2 * 2)
    # Cells are counted, not values; of the batch, not of each image.
    many = [values.expand(2, 4, 1, 3) for values in (student, teacher)]
    masks = torch.cat((mask, torch.tensor([[[[1, 0, 0]]]])))
    assert fgfi_loss(*many, masks).item() == pytest.approx(4 * (4 + 9 + 4) / (2 * 3))


def test_equals_the_formula() -> None:
    student, teacher = numbers(2, 3, 4, 5, seed=0), numbers(2, 3, 4, 5, seed=1)
    mask = np.random.default_rng(2).random((2, 1, 4, 5)) < 0.4
    total, cells = 0.0, 0
    for n, y, x in np.ndindex(2, 4, 5):
        if mask[n, 0, y, x]:
            cells += 1
            total += sum((student[n, c, y, x] - teacher[n, c, y, x]) ** 2 for c in range(3))
    found = fgfi_loss(*tensors(student, teacher), torch.from_numpy(mask))
    assert found.item() == pytest.approx(total / (2 * cells), rel=RTOL)


@pytest.mark.parametrize("cast", [Tensor.bool, Tensor.int, Tensor.float, Tensor.double])
def test_types_of_masks(cast: Callable[[Tensor], Tensor]) -> None:
    found = fgfi_loss(TestFgfi.student, TestFgfi.teacher, cast(MASK))
    assert found.item() == fgfi_loss(TestFgfi.student, TestFgfi.teacher, MASK).item()
    assert found.dtype == torch.float64


def test_an_empty_mask_gives_a_differentiable_zero() -> None:
    student = TestFgfi.student.clone().requires_grad_()
    loss = fgfi_loss(student, TestFgfi.teacher, torch.zeros_like(MASK))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 3, 5), (1, 1, 3, 5), (2, 1, 5, 3), (2, 1, 1, 1)])
def test_other_masks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match=r"mask is of shape .*; allowed: one value a cell, \(2, 1, 3, 5\)"):
        fgfi_loss(TestFgfi.student, TestFgfi.teacher, torch.ones(shape))


# The mask.


def looped_mask(
    boxes: list[np.ndarray],
    size: tuple[int, int],
    stride: int,
    scales: tuple[float, ...] = (4.0, 8.0, 16.0),
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    threshold: float = 0.5,
) -> np.ndarray:
    """Corners of anchors and overlaps with one pixel more a side, one after the other."""
    mask = np.zeros((len(boxes), 1, *size), dtype=bool)
    for n, rows in enumerate(boxes):
        for x0, y0, x1, y1 in rows:
            overlaps = np.zeros((*size, len(scales) * len(ratios)))
            for y, x, a in np.ndindex(*overlaps.shape):
                side, ratio = scales[a // len(ratios)] * stride, ratios[a % len(ratios)]
                half_w, half_h = (side / ratio**0.5 - 1) / 2, (side * ratio**0.5 - 1) / 2
                cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                width = min(x1, cx + half_w) - max(x0, cx - half_w) + 1
                height = min(y1, cy + half_h) - max(y0, cy - half_h) + 1
                if width > 0 and height > 0:
                    area = (x1 - x0 + 1) * (y1 - y0 + 1) + (2 * half_w + 1) * (2 * half_h + 1)
                    overlaps[y, x, a] = width * height / (area - width * height)
            mask[n, 0] |= (overlaps > threshold * overlaps.max()).any(-1)
    return mask


def random_boxes(seed: int, view: float = 100.0) -> list[np.ndarray]:
    """Return boxes of three images, the last with none; some reach over the view or are points."""
    rng = np.random.default_rng(seed)
    centre, side = rng.uniform(-0.1 * view, 1.1 * view, (9, 2)), rng.exponential(0.3 * view, (9, 2))
    side[4] = 0
    rows = np.concatenate((centre - side / 2, centre + side / 2), 1)
    return [rows[:7], rows[7:], rows[:0]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("size", "stride"), [((9, 13), 8), ((5, 6), 16), ((1, 1), 32)])
def test_mask_equals_loops(seed: int, size: tuple[int, int], stride: int) -> None:
    boxes = random_boxes(seed)
    found = fgfi_mask(tensors(*boxes), size=size, stride=stride)
    assert found.dtype == torch.bool and found.shape == (3, 1, *size)
    np.testing.assert_array_equal(found.numpy(), looped_mask(boxes, size, stride))
    assert not found[2].any()


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.0}, {"threshold": 0.9}, {"scales": (2.0,)}, {"ratios": (0.25, 1.0)}, {"ratios": (3.0,)}],
)
def test_options_of_the_mask(options: dict[str, Any]) -> None:
    boxes = random_boxes(9)
    found = fgfi_mask(tensors(*boxes), size=(9, 13), stride=8, **options)
    np.testing.assert_array_equal(found.numpy(), looped_mask(boxes, (9, 13), 8, **options))


def test_mask_by_hand() -> None:
    # Square anchors of 8 pixels on cells of 8, and an object that with its further pixel is the middle cell: its own
    # anchor overlaps by 1; no other touches it.
    boxes = [torch.tensor([[8.5, 8.5, 15.5, 15.5]])]
    options: dict[str, Any] = {"size": (3, 4), "stride": 8, "scales": (1.0,), "ratios": (1.0,)}
    assert fgfi_mask(boxes, **options)[0, 0].nonzero().tolist() == [[1, 1]]
    # Two cells share it evenly: both are at the largest overlap, and only a threshold below 1 lets them in.
    between = [torch.tensor([[12.5, 8.5, 19.5, 15.5]])]
    assert fgfi_mask(between, **options, threshold=0.99)[0, 0].nonzero().tolist() == [[1, 1], [1, 2]]
    # Strictly more than the threshold: a quarter beside three quarters of a cell, 1/7 and 3/5, is 5/21 of it.
    uneven = [torch.tensor([[10.5, 8.5, 17.5, 15.5]])]
    for threshold, cells in ((5 / 21 - 1e-5, 2), (5 / 21 + 1e-5, 1)):
        assert fgfi_mask(uneven, **options, threshold=threshold).sum() == cells
    # The objects' own thresholds, one of which would hide the other: large and small both leave cells.
    assert fgfi_mask([torch.cat((boxes[0], torch.tensor([[25.0, 17.0, 26.0, 18.0]])))], **options).sum() == 2


def test_overlap_at_the_threshold_is_off() -> None:
    # Exact in binary: the cell beside has half of the largest overlap.
    boxes = [torch.tensor([[0.5, 0.5, 7.5, 15.5]], dtype=torch.float64)]
    options: dict[str, Any] = {"size": (3, 1), "stride": 8, "scales": (1.0,), "ratios": (1.0,)}
    # Cells 0 and 1 lie in the object whole, overlap 1/2 each; cell 2 does not touch it.
    assert fgfi_mask(boxes, **options, threshold=0.5).flatten().tolist() == [True, True, False]
    taller = [torch.tensor([[0.5, 0.5, 7.5, 7.5], [0.5, 0.5, 7.5, 19.5]], dtype=torch.float64)]
    # 20 pixels: overlaps 8/20, 8/20 and 4/24 = 5/12 of the largest.
    assert fgfi_mask(taller, **options, threshold=0.5).flatten().tolist() == [True, True, False]
    assert fgfi_mask(taller, **options, threshold=0.4).flatten().tolist() == [True, True, True]


def test_an_object_equally_near_to_all_cells_is_off_only_at_the_threshold_itself() -> None:
    boxes = [torch.tensor([[0.5, 0.5, 15.5, 15.5]])]
    options: dict[str, Any] = {"size": (2, 2), "stride": 8, "scales": (1.0,), "ratios": (1.0,)}
    assert fgfi_mask(boxes, **options, threshold=0.5).all()
    assert not fgfi_mask(boxes, **options, threshold=1.0).any()


def test_an_object_that_no_anchor_touches_leaves_the_mask_empty() -> None:
    boxes = [torch.tensor([[900.0, 900.0, 950.0, 950.0]])]
    assert not fgfi_mask(boxes, size=(4, 4), stride=8).any()


@pytest.mark.parametrize("boxes", [[], [torch.zeros(0, 4)], [torch.zeros(0, 4)] * 3])
def test_no_boxes_at_all(boxes: list[Tensor]) -> None:
    found = fgfi_mask(boxes, size=(2, 3), stride=8)
    assert found.dtype == torch.bool and found.shape == (len(boxes), 1, 2, 3) and not found.any()


@pytest.mark.parametrize("limit", [1, 9 * 9 * 13 * 4])
def test_chunks_change_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = tensors(*random_boxes(3))
    whole = fgfi_mask(boxes, size=(9, 13), stride=8)
    shapes = []
    overlaps = fgfi._overlaps
    monkeypatch.setattr(fgfi, "MAX_OVERLAPS", limit)
    monkeypatch.setattr(fgfi, "_overlaps", lambda part, *rest: (shapes.append(len(part)), overlaps(part, *rest))[1])
    assert torch.equal(fgfi_mask(boxes, size=(9, 13), stride=8), whole)
    assert shapes == ([1] * 9 if limit == 1 else [4, 4, 1])


def test_half_boxes_are_compared_in_float32() -> None:
    boxes = [rows.half() for rows in tensors(*random_boxes(3))]
    found = fgfi_mask(boxes, size=(9, 13), stride=8)
    assert torch.equal(found, fgfi_mask([rows.float() for rows in boxes], size=(9, 13), stride=8))


# The module.


@pytest.mark.parametrize("relu", [False, True])
def test_module(relu: bool, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    labels = case.targets.labels
    loss = FGFI(case.teacher, case.student, relu=relu, threshold=0.7).double()
    boxes = [labels.boxes.detach()[labels.image == n].numpy() for n in range(2)]
    expected = 0.0
    for level, adapter in enumerate(loss.adapters):
        convolution = adapter[0]
        assert convolution.kernel_size == (3, 3) and convolution.bias is not None
        theirs = case.targets.features[level].detach().numpy()
        ours = convolution(case.output.features[level]).detach().numpy()
        if relu:
            assert ours.min() < 0
            ours = np.maximum(ours, 0)
        assert ours.shape == theirs.shape
        mask = looped_mask(boxes, theirs.shape[2:], 8 << level, threshold=0.7)
        expected += ((ours - theirs) ** 2 * mask).sum() / (2 * mask.sum())
    assert loss(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


def test_defaults(make_case: Cases) -> None:
    case = make_case()
    loss = FGFI(case.teacher, case.student)
    assert loss.threshold == 0.5
    assert not any(isinstance(layer, nn.ReLU) for layer in loss.modules())


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0, float("nan")])
def test_threshold_out_of_range(value: float, make_case: Cases) -> None:
    case = make_case()
    with pytest.raises(SettingError, match=r"loss fgfi: threshold=.* allowed: finite numbers from 0 to below 1"):
        FGFI(case.teacher, case.student, threshold=value)
