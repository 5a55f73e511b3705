"""In: the labelled boxes of each image and the anchors' grid. Out: the valuable localization region's weights (LD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6
# Objects at a time: at 8400 anchors a tensor of overlaps takes 4 MiB, and about eight live at once.
BLOCK = 64


def vlr_weights(
    boxes: Sequence[Tensor],
    *,
    grids: Sequence[tuple[int, int]],
    strides: Sequence[int],
    gamma: float = 0.25,
    topk: int = 9,
    octave: float = 8,
) -> Tensor:
    """Return IoU(anchor box, object) on the valuable localization region and 0 elsewhere, (N, A) float32.

    Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022. The anchor box of a cell is the
    square of side octave · stride about its centre. An object's threshold is α = mean + unbiased deviation of the IoU
    of its candidates, the `topk` anchors of each level (all of a smaller level) whose centres are nearest to its own;
    of equally near ones the first. Its region is γα ≤ DIoU(anchor box, object) < α over all anchors; an anchor in
    several regions takes the largest IoU. As in the authors' code, except that an image without objects gives zeros
    where theirs fails.

    A row depends on its image alone: computed image by image, in float64, at most 64 objects at a time (about 35 MB at
    8400 anchors).

    Args:
        boxes: one (k, 4) an image, xyxy in pixels of the view; k may be 0.
        grids: (H, W) of each level. strides: pixels of a cell of each level.
        gamma: γ, the share of α from which the region begins. topk: candidates a level. octave: side of an anchor box
            in cells.
    """
    device = boxes[0].device if boxes else torch.device("cpu")
    anchors = _anchor_boxes(grids, strides, octave, device)
    sizes = [height * width for height, width in grids]
    weights = torch.zeros(len(boxes), sum(sizes), device=device)
    for row, objects in zip(weights, boxes, strict=True):
        for block in torch.split(objects.detach().double(), BLOCK):
            if len(block):
                torch.maximum(row, _regions(block, anchors, sizes, gamma, topk).amax(0).to(row.dtype), out=row)
    return weights


def _anchor_boxes(
    grids: Sequence[tuple[int, int]], strides: Sequence[int], octave: float, device: torch.device
) -> Tensor:
    """Return (A, 4) xyxy in pixels, float64, level-major and row-major."""
    levels = []
    for (height, width), stride in zip(grids, strides, strict=True):
        x = (torch.arange(width, device=device, dtype=torch.float64) + 0.5) * stride
        y = (torch.arange(height, device=device, dtype=torch.float64) + 0.5) * stride
        centres = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1).flatten(0, 1)
        half = octave * stride / 2
        levels.append(torch.cat((centres - half, centres + half), 1))
    return torch.cat(levels)


def _regions(objects: Tensor, anchors: Tensor, sizes: list[int], gamma: float, topk: int) -> Tensor:
    """Return the IoU of each object with the anchors of its region, 0 elsewhere, (k, A)."""
    iou, diou, distance = _overlaps(objects, anchors)
    near = _nearest(distance, sizes, topk)
    candidates = iou.gather(1, near)
    threshold = candidates.mean(1) + candidates.std(1, correction=min(near.shape[1] - 1, 1))
    inside = (diou >= gamma * threshold[:, None]) & (diou < threshold[:, None])
    return torch.where(inside, iou, 0.0)


def _overlaps(objects: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return IoU, DIoU and squared distance of centres, (k, A) each."""
    lows = (objects[:, None, :2], anchors[None, :, :2])
    highs = (objects[:, None, 2:], anchors[None, :, 2:])
    overlap = (torch.minimum(*highs) - torch.maximum(*lows)).clamp(min=0).prod(-1)
    areas = [(high - low).prod(-1) for low, high in zip(lows, highs, strict=True)]
    iou = overlap / (areas[0] + areas[1] - overlap).clamp(min=EPSILON)
    hull = _squared_length(torch.maximum(*highs) - torch.minimum(*lows))
    centres = [(low + high) / 2 for low, high in zip(lows, highs, strict=True)]
    distance = _squared_length(centres[0] - centres[1])
    return iou, iou - distance / hull.clamp(min=EPSILON), distance


def _squared_length(vectors: Tensor) -> Tensor:
    x, y = vectors.unbind(-1)
    return x.square() + y.square()


def _nearest(distance: Tensor, sizes: list[int], topk: int) -> Tensor:
    """Return the indices of the `topk` smallest distances of each level, (k, n); of equal ones the first."""
    chosen = []
    for level in torch.split(distance, sizes, 1):
        count = min(topk, level.shape[1])
        # topk alone does not say which of equal distances it returns, and two devices may differ.
        last = level.topk(count, dim=1, largest=False).values[:, -1:]
        closer, equal = level < last, level == last
        missing = count - closer.sum(1, keepdim=True)
        chosen.append(closer | (equal & (equal.cumsum(1) <= missing)))
    return torch.cat(chosen, 1).nonzero()[:, 1].view(len(distance), -1)
