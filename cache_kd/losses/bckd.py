"""In: class logits and boxes. Out: binary class distillation and IoU box distillation (BCKD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.losses.anchors import box_anchors, confidence, rows_at, total_confidence
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.boxes import decode_boxes
from cache_kd.losses.numeric import at_least_float32, comparable, sum_rows
from cache_kd.losses.options import Allowed, at_least
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

EPSILON = 1e-6


def bckd_cls_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return Σ_a weight_a · Σ_c |p_t − p_s|^β · BCE(s_c, p_t,c) / normalizer with p = σ(logit).

    Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023. Sum
    over classes and rows; 0, its minimum, at student = teacher. The factor |p_t − p_s| is not detached, as in the
    authors' code, which divides by the number of positives and drops levels that have none.

    Args:
        student: (n, K) logits.
        teacher: (n, K) logits, never receives gradient.
        beta: β, 1 in the paper; from 1 up, below it the gradient at student = teacher is infinite.
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is 1.
    """
    student, teacher = comparable(student, teacher)
    target = teacher.sigmoid()
    gap = (target - student.sigmoid()).abs()
    entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return sum_rows(((gap if beta == 1 else gap**beta) * entropy).sum(-1), weight, normalizer)


def bckd_box_loss(
    student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, normalizer: float | Tensor | None = None
) -> Tensor:
    """Return Σ_a weight_a · (1 − GIoU(student_a, teacher_a)) / normalizer.

    The localization half of BCKD (see `bckd_cls_loss`). Sum over rows; 0 at student = teacher for boxes of more than
    1e-6 in area. The authors' code gives weight max_c |p_t − p_s| without gradient and multiplies 4.0 outside.

    Args:
        student: (n, 4) xyxy in grid units.
        teacher: (n, 4) xyxy in grid units, never receives gradient.
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is 1.
    """
    student, teacher = comparable(student, teacher)
    return sum_rows(1 - _giou(student, teacher), weight, normalizer)


def _giou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the generalised IoU (n,) of pairs of boxes xyxy (n, 4); areas are at least 1e-6."""
    overlap = _area(torch.maximum(ours[:, :2], theirs[:, :2]), torch.minimum(ours[:, 2:], theirs[:, 2:]))
    hull = _area(torch.minimum(ours[:, :2], theirs[:, :2]), torch.maximum(ours[:, 2:], theirs[:, 2:]))
    areas = [(box[:, 2:] - box[:, :2]).prod(-1) for box in (ours, theirs)]
    union = (areas[0] + areas[1] - overlap).clamp(min=EPSILON)
    hull = hull.clamp(min=EPSILON)
    return overlap / union - (hull - union) / hull


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)


class BCKD(DistillLoss):
    """`bckd_cls_loss` over all anchors + `box_weight` · `bckd_box_loss`, both divided by Z = max(Σ max_c p_t, 1).

    Boxes count on sent anchors with max_c p_t > 0.05, each by max_c |p_t − p_s| without gradient. They are decoded, so
    teacher and student may have different `reg_max`.
    """

    name = "bckd"
    title = "class probabilities as binary maps, and boxes where the classes still disagree"
    paper = "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection, ICCV 2023"
    needs = frozenset({"logits"})
    default_weight = 0.55
    cost = "elementwise on the class logits; boxes of few anchors"
    protocol = "sigmoid"
    allowed: ClassVar[Mapping[str, Allowed]] = {"beta": at_least(1), "box_weight": at_least(0)}

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, beta: float = 1.0, box_weight: float = 4.0) -> None:
        super().__init__(teacher, student, beta=beta, box_weight=box_weight)
        self.beta = beta
        self.box_weight = box_weight
        self.reg_max = (student.reg_max, teacher.reg_max)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        scores = self.required(targets.scores, "logits")
        sure = confidence(scores)
        total = total_confidence(sure)
        loss = bckd_cls_loss(student.scores.flatten(0, 1), scores.flatten(0, 1), beta=self.beta, normalizer=total)
        return loss + self.box_weight * self._box_term(student, targets, box_anchors(sure, targets.sent), total)

    def _box_term(
        self, student: DetectorOutput, targets: TargetBatch, chosen: tuple[Tensor, Tensor], total: Tensor
    ) -> Tensor:
        logits, scores = self.required(targets.boxes, "logits"), self.required(targets.scores, "logits")
        ours = at_least_float32(rows_at(student.scores.detach(), chosen))
        gap = rows_at(scores, chosen).sigmoid() - ours.sigmoid()
        # Both boxes belong to one anchor and GIoU does not see a common shift: the anchor may stand at the origin.
        return bckd_box_loss(
            decode_boxes(at_least_float32(rows_at(student.boxes, chosen)), self.reg_max[0]),
            decode_boxes(rows_at(logits, chosen), self.reg_max[1]),
            weight=gap.abs().amax(-1),
            normalizer=total,
        )
