"""In: feature maps and labelled boxes. Out: the maps' squared difference at cells near an object (FGFI)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_kd.losses.labels import boxes_by_image, cell_centres
from cache_kd.losses.maps import MapLoss
from cache_kd.losses.numeric import at_least_float32, cell_mask, comparable
from cache_kd.losses.options import Allowed, from_to_below
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

# Overlaps of so many pairs of anchor and box are held at a time: 64 MiB a tensor of float32, two of them alive.
MAX_OVERLAPS = 2**24


def fgfi_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the fine-grained feature imitation loss of one level.

    Σ (S − T)²·I / (2·Σ I): sums over the batch, not divided by the channels; 0 at S = T and for an empty mask. Wang et
    al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019; its weight 0.01 is outside. The
    authors' code is the same and trains with one image a batch.

    Args:
        student: S, (N, F, H, W), after the adapter.
        teacher: T, (N, F, H, W), never receives gradient.
        mask: I, (N, 1, H, W) bool or 0/1; 1 is imitated. See `fgfi_mask`.
    """
    student, teacher = comparable(student, teacher)
    imitated = cell_mask(mask, student)
    squares = F.mse_loss(student, teacher, reduction="none")
    return (squares * imitated).sum() / (2 * imitated.sum().clamp(min=1))


def fgfi_mask(
    boxes: Sequence[Tensor],
    *,
    size: tuple[int, int],
    stride: int,
    scales: tuple[float, ...] = (4.0, 8.0, 16.0),
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    threshold: float = 0.5,
) -> Tensor:
    """Return the cells to imitate, (N, 1, H, W) bool.

    A cell is on if, for any object, one of its anchors overlaps the object by more than `threshold` times the largest
    overlap that any anchor of this map has with it. Anchors stand on the cell's centre, one of sides
    (s / √r, s · √r) for each side s = scale · `stride` and ratio r = height / width, also where they leave the image.
    An overlap is an IoU in which every side counts one pixel more than the difference of its coordinates, as the
    authors' code has it; anchors have their nominal sides, which that code rounds to whole pixels. Its anchors are
    those of the detector; YOLO has none, so here the sides follow each level's stride.

    All boxes and anchors at once, in chunks of at most 2^24 overlaps, 128 MiB in float32: at stride 8 and 640 pixels,
    100 boxes take 44 MiB.

    Args:
        boxes: N tensors (k, 4), xyxy in pixels of the view; k may be 0.
        size: (H, W) of the map.
        stride: pixels a cell.
        threshold: ψ, from 0 to below 1.
    """
    height, width = size
    counts = [len(rows) for rows in boxes]
    if not any(counts):
        device = boxes[0].device if len(boxes) else None
        return torch.zeros((len(boxes), 1, height, width), dtype=torch.bool, device=device)
    rows = at_least_float32(torch.cat([rows.detach() for rows in boxes]))
    image = torch.repeat_interleave(torch.tensor(counts, device=rows.device))
    hits = torch.zeros((len(boxes), height, width), device=rows.device)
    anchors = _anchor_sides(scales, ratios, stride, rows)
    chunk = max(1, MAX_OVERLAPS // (len(anchors) * height * width))
    for part, owner in zip(torch.split(rows, chunk), torch.split(image, chunk), strict=True):
        best = _overlaps(part, anchors, size, stride).amax(1)
        near = best > threshold * best.amax((1, 2), keepdim=True)
        hits.index_add_(0, owner, near.to(hits.dtype))
    return hits.unsqueeze(1) > 0


def _anchor_sides(scales: tuple[float, ...], ratios: tuple[float, ...], stride: int, like: Tensor) -> Tensor:
    """Return (width, height) of every anchor, (R, 2)."""
    sides = [(scale * stride / ratio**0.5, scale * stride * ratio**0.5) for scale in scales for ratio in ratios]
    return like.new_tensor(sides)


def _overlaps(boxes: Tensor, anchors: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Return the IoU (k, R, H, W) of boxes (k, 4) with anchors (R, 2) on every cell."""
    x, y = cell_centres(*size, device=boxes.device, dtype=boxes.dtype)
    # One pixel more a side: half a pixel on either end of the box, and anchors of their full sides.
    low, high = boxes[:, None, :2] - 0.5, boxes[:, None, 2:] + 0.5
    shared_x = _shared(low[..., :1], high[..., :1], x * stride, anchors[:, :1])
    shared_y = _shared(low[..., 1:], high[..., 1:], y * stride, anchors[:, 1:])
    areas = (high - low).prod(-1) + anchors.prod(-1)
    shared = shared_y.unsqueeze(-1) * shared_x.unsqueeze(-2)
    return shared.div_(areas[..., None, None] - shared)


def _shared(low: Tensor, high: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """Return the length (k, R, n) that boxes (k, 1, 1) and anchors of sides (R, 1) at n centres share on one axis."""
    return (torch.minimum(high, centre + side / 2) - torch.maximum(low, centre - side / 2)).clamp(min=0)


class FGFI(MapLoss):
    """`fgfi_loss` under `fgfi_mask` of the labelled boxes, summed over the pairs, behind a 3x3 convolution a pair.

    The authors' adapter ends in a ReLU (`relu=true`), which cannot fit the values below 0 that the SiLU of a YOLO neck
    leaves. Each pair has the anchors of its own stride. The authors leave the term out for the first 400 iterations:
    that is the `warmup` of a spec.
    """

    name = "fgfi"
    title = "the neck's maps at cells whose anchors overlap an object"
    paper = "Distilling Object Detectors with Fine-grained Feature Imitation, CVPR 2019"
    reads = frozenset({"labels"})
    default_weight = 0.03
    cost = "3x3 convolution and one squared difference a map; overlaps of all boxes with nine anchors a cell"
    allowed: ClassVar[Mapping[str, Allowed]] = {**MapLoss.allowed, "threshold": from_to_below(0, 1)}

    def __init__(
        self,
        teacher: HeadSpec,
        student: HeadSpec,
        *,
        layers: tuple[str, ...] = (),
        relu: bool = False,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(teacher, student, layers=layers, relu=relu, threshold=threshold)
        self.threshold = threshold
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Conv2d(ours.channels, theirs.channels, 3, padding=1), nn.ReLU() if relu else nn.Identity())
            for ours, theirs in self.pairs
        )

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        labels = self.required(targets.labels, "labels")
        maps = self.maps(student, targets)
        boxes = boxes_by_image(labels, len(maps[0][0]))
        losses = []
        for adapter, (ours, theirs), (_, tap) in zip(self.adapters, maps, self.pairs, strict=True):
            height, width = theirs.shape[2:]
            mask = fgfi_mask(boxes, size=(height, width), stride=tap.stride, threshold=self.threshold)
            losses.append(fgfi_loss(adapter(ours), theirs, mask))
        return sum(losses[1:], losses[0])
