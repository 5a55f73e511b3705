"""In: class and box logits of one view, a teacher's or a student's. Out: the boxes that they say, in pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from cache_kd.losses.boxes import decode_boxes
from cache_kd.losses.labels import cell_centres
from cache_kd.structures import HeadSpec

THRESHOLD = 0.25
"""Least score of a box that is shown, as in Ultralytics' predictor."""
OVERLAP = 0.7
"""IoU above which the weaker of two boxes of a class is dropped, as in Ultralytics' predictor."""
MOST = 300
FOUND = 0.5
"""IoU from which a labelled object counts as found."""


@dataclass(frozen=True)
class Detections:
    """Boxes (n, 4) xyxy in pixels of the view, scores (n,) in 0..1 and classes (n,) int64, the highest score first."""

    boxes: Tensor
    scores: Tensor
    cls: Tensor

    def __len__(self) -> int:
        return len(self.scores)


def anchor_boxes(box_logits: Tensor, head: HeadSpec, imgsz: int) -> Tensor:
    """Return (A, 4) boxes xyxy in pixels of the view, of (A, 4·R) box logits in the order of the head's levels."""
    boxes = decode_boxes(box_logits.float(), head.reg_max)
    centres, strides = [], []
    for tap, (height, width) in zip(head.taps, head.grids(imgsz), strict=True):
        x, y = cell_centres(height, width, device=boxes.device, dtype=boxes.dtype)
        centres.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1).flatten(0, 1))
        strides.append(boxes.new_full((height * width, 1), float(tap.stride)))
    return (boxes + torch.cat(centres).repeat(1, 2)) * torch.cat(strides)


def detections(
    scores: Tensor,
    box_logits: Tensor,
    head: HeadSpec,
    imgsz: int,
    *,
    sent: Tensor | None = None,
    threshold: float = THRESHOLD,
    overlap: float = OVERLAP,
) -> Detections:
    """Return what is left of one view's anchors after a threshold and non-maximum suppression within each class.

    An anchor says its best class alone, as in Ultralytics' predictor. The one-to-many head of YOLO26 is treated alike:
    its anchors repeat one another as those of other heads do.

    Args:
        scores: (A, C) logits. box_logits: (A, 4·R). imgsz: side of the view in pixels.
        sent: (A,) bool, the anchors whose logits are known; None means all.
    """
    best, cls = scores.float().sigmoid().max(dim=1)
    chosen = best > threshold
    chosen = chosen if sent is None else chosen & sent
    boxes, best, cls = anchor_boxes(box_logits, head, imgsz)[chosen], best[chosen], cls[chosen]
    kept = batched_nms(boxes, best, cls, overlap)[:MOST]
    return Detections(boxes[kept], best[kept], cls[kept])


def count_found(labels: Detections, said: Detections) -> int:
    """Return how many labelled objects are found: each by its own box of its class, with an IoU of at least `FOUND`.

    Boxes take objects in the order of their scores, each the free one that it overlaps most.
    """
    if not len(labels) or not len(said):
        return 0
    iou = box_iou(said.boxes, labels.boxes.to(said.boxes))
    iou[said.cls[:, None] != labels.cls[None]] = 0
    found = 0
    for row in range(len(said)):
        overlap, column = iou[row].max(dim=0)
        if overlap >= FOUND:
            found += 1
            iou[:, column] = 0
    return found
