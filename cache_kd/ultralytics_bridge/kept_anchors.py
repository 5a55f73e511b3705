"""In: the labelled boxes of a view. Out: the anchors whose logits are kept whatever their score."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from ultralytics.utils.tal import TaskAlignedAssigner, make_anchors

from cache_kd.losses.vlr import vlr_weights
from cache_kd.structures import HeadSpec


class KeptAnchors:
    """Says which anchors of a head losses read for their place.

    Args:
        head: The teacher's. imgsz: Side of the square views in pixels. store: With "vlr", LD's valuable region too.
    """

    def __init__(self, head: HeadSpec, imgsz: int, store: Collection[str]) -> None:
        self.head, self.imgsz, self.store = head, imgsz, store
        strides = [tap.stride for tap in head.taps]
        self._assigner = TaskAlignedAssigner(num_classes=head.num_classes, stride=strides)
        self._centres = _anchor_centres(head, imgsz)

    def kept(self, boxes: np.ndarray) -> np.ndarray:
        """Return (A,) bool: the anchors to keep whatever their score, of `boxes` (n, 4), xyxy in pixels."""
        inside = self.in_box(boxes)
        return inside | self.valuable(boxes) if "vlr" in self.store else inside

    def valuable(self, boxes: np.ndarray) -> np.ndarray:
        """Return (A,) bool: LD's valuable localization region around `boxes` (n, 4), xyxy in pixels."""
        grids, strides = self.head.grids(self.imgsz), [tap.stride for tap in self.head.taps]
        weights = vlr_weights([torch.from_numpy(boxes).float()], grids=grids, strides=strides)
        return (weights[0] > 0).numpy()

    def in_box(self, boxes: np.ndarray) -> np.ndarray:
        """Return (A,) bool: which anchors the assigner may ever give to one of `boxes` (n, 4), xyxy in pixels."""
        if not len(boxes):
            return np.zeros(self.head.num_anchors(self.imgsz), dtype=bool)
        truth = torch.from_numpy(boxes).unsqueeze(0)
        mask = torch.ones(1, len(boxes), 1)
        inside: Tensor = self._assigner.select_candidates_in_gts(self._centres, truth, mask)
        return inside.any(dim=1).squeeze(0).numpy()


def _anchor_centres(head: HeadSpec, imgsz: int) -> Tensor:
    """Return (A, 2) anchor centres in pixels of the view."""
    maps = [torch.empty(1, 1, height, width) for height, width in head.grids(imgsz)]
    centres, strides = make_anchors(maps, torch.tensor([float(tap.stride) for tap in head.taps]))
    pixels: Tensor = centres * strides
    return pixels
