"""The valuable localization region by hand, against its definition in loops, and independent of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cache_kd.losses.vlr import BLOCK, vlr_weights

GRIDS, STRIDES = ((12, 15), (6, 8), (1, 3)), (8, 16, 32)
ANCHORS = sum(height * width for height, width in GRIDS)


def draw_boxes(count: int, seed: int) -> Tensor:
    """Boxes of 4 to 110 pixels in a view of 120 x 96, some reaching out of it."""
    random = np.random.default_rng(seed)
    low = random.uniform(-10, (100, 80), (count, 2))
    return torch.from_numpy(np.concatenate((low, low + random.uniform(4, 110, (count, 2))), 1)).float()


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return float(inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter))


def squared_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2)


def reference(boxes: np.ndarray, gamma: float, topk: int, octave: float) -> np.ndarray:
    """The definition as loops over levels, anchors and objects of one image."""
    levels = []
    for (height, width), stride in zip(GRIDS, STRIDES, strict=True):
        half = octave * stride / 2
        centres = [((column + 0.5) * stride, (row + 0.5) * stride) for row in range(height) for column in range(width)]
        levels.append([np.array([x - half, y - half, x + half, y + half]) for x, y in centres])
    weights = np.zeros(ANCHORS)
    for box in boxes:
        candidates = []
        for level in levels:
            nearest = sorted(level, key=lambda anchor: squared_distance(anchor, box))[:topk]
            candidates += [overlap(anchor, box) for anchor in nearest]
        threshold = np.mean(candidates) + np.std(candidates, ddof=1)
        for index, anchor in enumerate(anchor for level in levels for anchor in level):
            diagonal = (max(anchor[2], box[2]) - min(anchor[0], box[0])) ** 2
            diagonal += (max(anchor[3], box[3]) - min(anchor[1], box[1])) ** 2
            iou = overlap(anchor, box)
            if gamma * threshold <= iou - squared_distance(anchor, box) / diagonal < threshold:
                weights[index] = max(weights[index], iou)
    return weights


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5}, {"topk": 4}, {"octave": 4.0}])
def test_equals_its_definition(options: dict[str, Any]) -> None:
    full = {"gamma": 0.25, "topk": 9, "octave": 8.0, **options}
    boxes = [draw_boxes(6, 0), draw_boxes(1, 1), draw_boxes(0, 2), draw_boxes(3, 3)]
    found = vlr_weights(boxes, grids=GRIDS, strides=STRIDES, **options)
    assert found.shape == (4, ANCHORS) and found.dtype == torch.float32
    for row, objects in zip(found, boxes, strict=True):
        expected = reference(objects.double().numpy(), **full)
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-6, atol=0)
        assert not len(objects) or 0 < (expected > 0).sum() < ANCHORS


def test_by_hand() -> None:
    # Two cells under one box: IoU 1/2 each, deviation 0, so α = 1/2; DIoU = 1/2 − 4²/(16² + 8²) = 0.45.
    grid = {"grids": [(1, 2)], "strides": [8], "octave": 1}
    box = [torch.tensor([[0.0, 0.0, 16.0, 8.0]])]
    assert vlr_weights(box, **grid).tolist() == [[0.5, 0.5]]
    assert vlr_weights(box, **grid, gamma=0.89).tolist() == [[0.5, 0.5]]
    assert vlr_weights(box, **grid, gamma=0.91).tolist() == [[0.0, 0.0]]


def test_an_anchor_as_good_as_the_threshold_is_no_part_of_the_region() -> None:
    # One cell in all, under a box of its own size: α = DIoU = 1.
    found = vlr_weights([torch.tensor([[0.0, 0.0, 8.0, 8.0]])], grids=[(1, 1)], strides=[8], octave=1)
    assert found.tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("grid", "top", "region"),
    [
        # The neighbours above, left, right, below are equally near. The one above has no overlap: α = 1/6 + 1/6·√2.
        ((3, 3), 8.0, [0, 0, 0, 1, 1, 1, 0, 0, 0]),
        # Left, right, below: the left one overlaps as much as the middle, which α = 1/3 shuts out.
        ((2, 3), 0.0, [1, 0, 1, 0, 0, 0]),
    ],
)
def test_of_equally_near_anchors_the_first_are_candidates(grid: tuple[int, int], top: float, region: list[int]) -> None:
    box = torch.tensor([[0.0, top, 24.0, top + 8]])
    found = vlr_weights([box], grids=[grid], strides=[8], octave=1, topk=2)
    torch.testing.assert_close(found, torch.tensor([region]) / 3)


def test_an_anchor_of_several_regions_takes_the_largest_overlap() -> None:
    boxes = draw_boxes(5, 4)
    alone = torch.stack([vlr_weights([box[None]], grids=GRIDS, strides=STRIDES)[0] for box in boxes])
    assert ((alone > 0).sum(0) > 1).any()
    together = vlr_weights([boxes], grids=GRIDS, strides=STRIDES)[0]
    torch.testing.assert_close(together, alone.amax(0), rtol=1e-6, atol=0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = [draw_boxes(count, count) for count in (2, 0, BLOCK + 5, 1)]
    together = vlr_weights(images, grids=GRIDS, strides=STRIDES)
    for row, boxes in zip(together, images, strict=True):
        assert torch.equal(row, vlr_weights([boxes], grids=GRIDS, strides=STRIDES)[0])


def test_without_objects_or_images() -> None:
    assert vlr_weights([torch.zeros(0, 4)] * 2, grids=GRIDS, strides=STRIDES).tolist() == [[0.0] * ANCHORS] * 2
    assert vlr_weights([], grids=GRIDS, strides=STRIDES).shape == (0, ANCHORS)


@pytest.mark.parametrize("box", [[5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.0, 30.0], [500.0, 500.0, 520.0, 520.0]])
def test_boxes_without_overlap_have_no_region(box: list[float]) -> None:
    assert not vlr_weights([torch.tensor([box])], grids=GRIDS, strides=STRIDES).any()


def test_labels_get_no_gradient() -> None:
    boxes = draw_boxes(2, 0).requires_grad_()
    assert not vlr_weights([boxes], grids=GRIDS, strides=STRIDES).requires_grad


class Watch(TorchDispatchMode):
    """Counts operations, and the elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def watched(count: int) -> Watch:
    with Watch() as watch:
        vlr_weights([draw_boxes(count, 0)], grids=GRIDS, strides=STRIDES)
    return watch


def test_no_loop_over_boxes_and_bounded_memory() -> None:
    assert watched(1).operations == watched(BLOCK).operations
    assert watched(3 * BLOCK).largest <= 2 * BLOCK * ANCHORS
