"""In: feature maps and a class a cell. Out: how differently cells resemble the mean of their class (IFVD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.errors import MismatchError
from cache_kd.losses.labels import boxes_by_image
from cache_kd.losses.maps import MapLoss
from cache_kd.losses.numeric import at_least_float32
from cache_kd.losses.options import Allowed
from cache_kd.losses.rasters import label_map
from cache_kd.structures import DetectorOutput, HeadSpec, Labels, TargetBatch

IGNORED = -1
EPSILON = 1e-6


def ifvd_loss(student: Tensor, teacher: Tensor, label_map: Tensor, *, ignore_index: int = IGNORED) -> Tensor:
    """Return the intra-class feature variation distillation loss of one map.

    1 / (N·H·W) · Σ_n Σ_cells (M(S) − M(T))² with M(F)(p) = cos(F(p), μ_class(p)) and μ_k = Σ F / (count + 1e-6) over
    the cells of class k in the same image. Wang et al., "Intra-class Feature Variation Distillation for Semantic
    Segmentation", ECCV 2020, with λ = 200 outside. Mean over images and all cells; 0 at student = teacher. Cells with
    `ignore_index` add 0 but count in the divisor, as in the authors' code; gradient flows through the means too. There
    a cosine with an exact zero vector is 0 with a gradient of 1e8; here that gradient is 0.

    Args:
        student: (N, F, H, W).
        teacher: (N, F', H, W), never receives gradient; channels may differ.
        label_map: (N, H, W) integers; memory grows with N·H·W times the number of classes present.
        ignore_index: the value of cells that belong to no class.
    """
    student, teacher = at_least_float32(student), teacher.detach()
    cells = (student.shape[0], *student.shape[2:])
    if (teacher.shape[0], *teacher.shape[2:]) != cells:
        raise MismatchError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be of one shape but for channels"
        )
    if label_map.shape != cells or label_map.is_floating_point():
        raise MismatchError(
            f"label_map is {label_map.dtype} of shape {tuple(label_map.shape)}; allowed: one integer a cell, {cells}"
        )
    known = (label_map != ignore_index).flatten(1)
    # Cells of no class are one more group, whose values are dropped at the end.
    present, group = torch.unique(label_map.flatten(1), return_inverse=True)
    members = F.one_hot(group, max(len(present), 1)).to(student.dtype)  # (N, HW, K)
    gap = _likeness(student, members) - _likeness(teacher.to(student.dtype), members)
    return gap.masked_fill(~known, 0).square().sum() / max(known.numel(), 1)


def _likeness(features: Tensor, members: Tensor) -> Tensor:
    """Return the cosine (N, HW) between each cell of (N, F, H, W) and the mean of its group, (N, HW, K) of 0 and 1."""
    features = features.flatten(2)
    means = features @ members / (members.sum(1, keepdim=True) + EPSILON)
    centres = means @ members.transpose(1, 2)
    zero = (features == 0).all(1) | (centres == 0).all(1)
    return F.cosine_similarity(features, centres, dim=1).masked_fill(zero, 0)


class IFVD(MapLoss):
    """`ifvd_loss` summed over the pairs of maps; labels are the data set's boxes, drawn on each map.

    A cell has the class of the smallest box that holds its centre. Background is left out: unlike in segmentation it is
    no class but all there is beside the boxes. `background` makes it one.
    """

    name = "ifvd"
    title = "how far each cell of an object is from the mean of its class"
    paper = "Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020"
    reads = frozenset({"labels"})
    default_weight = 6.0
    cost = "two matrix products of a map with its class raster, for both maps"
    allowed: ClassVar[Mapping[str, Allowed]] = {**MapLoss.allowed}

    def __init__(
        self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = (), background: bool = False
    ) -> None:
        super().__init__(teacher, student, layers=layers, background=background)
        self._outside = student.num_classes if background else IGNORED

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        labels = self.required(targets.labels, "labels")
        losses = [
            ifvd_loss(ours, theirs, self._label_map(labels, ours, tap.stride))
            for (ours, theirs), (_, tap) in zip(self.maps(student, targets), self.pairs, strict=True)
        ]
        return sum(losses[1:], losses[0])

    def _label_map(self, labels: Labels, level: Tensor, stride: int) -> Tensor:
        images, _, height, width = level.shape
        boxes = boxes_by_image(labels, images)
        classes = torch.split(labels.cls, [len(rows) for rows in boxes])
        return label_map(boxes, classes, size=(height, width), stride=stride, ignore_index=self._outside)
