"""In: the student's hold maps and the teacher's head. Out: how far that head's answers are from its own (CrossKD)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.errors import MismatchError
from cache_kd.losses.anchors import MIN_BOX_SCORE, box_anchors, confidence, total_confidence
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.bckd import bckd_box_loss, bckd_cls_loss
from cache_kd.losses.boxes import decode_boxes
from cache_kd.losses.maps import channel_adapters
from cache_kd.losses.numeric import at_least_float32, comparable, sum_rows
from cache_kd.losses.options import Allowed, at_least, whole
from cache_kd.structures import DetectorOutput, HeadSpec, Tap, TargetBatch

EPSILON = 1e-6


def crosskd_cls_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return Σ_a weight_a · Σ_c |σ(z'_c) − p_t,c|^β · BCE(z'_c, p_t,c) / normalizer with p = σ(logit).

    Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024. The quality focal loss
    towards the teacher's probabilities, and so the arithmetic of `bckd_cls_loss`: sum over classes and rows, 0, its
    minimum, at z' = the teacher's logits, the factor not detached. The authors' code multiplies 1.0 outside (FCOS 0.4)
    and divides by the number of positives; unlike BCKD's, it keeps levels that have none.

    Args:
        student: z', (n, K) cross logits: the student's hold features through the rest of the teacher's head.
        teacher: (n, K) logits, never receives gradient.
        beta: β, 1 in the paper; from 1 up, below it the gradient at student = teacher is infinite.
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is 1.
    """
    return bckd_cls_loss(student, teacher, beta=beta, weight=weight, normalizer=normalizer)


def crosskd_box_loss(
    student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, normalizer: float | Tensor | None = None
) -> Tensor:
    """Return Σ_a weight_a · (1/4) Σ_{l,t,r,b} KL(softmax(t) ‖ softmax(d')) / normalizer.

    The box half of CrossKD (see `crosskd_cls_loss`) for heads with bins: T = 1, sum over bins (LD takes their mean),
    mean over the four sides, sum over rows. 0 at d' = the teacher's logits. The authors' code multiplies 4.0 outside,
    weighs an anchor by max_c p_t and divides by the sum of these weights. For heads without bins it takes the GIoU of
    decoded boxes, with 1 outside (FCOS: IoU, 0.75).

    Args:
        student: d', (n, 4, R) cross logits.
        teacher: (n, 4, R) logits, never receives gradient; a constant added to a side's logits changes nothing.
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is 1.
    """
    student, teacher = comparable(student, teacher)
    sides = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return sum_rows(sides.mean(-1), weight, normalizer)


def align_scale(student: Tensor, teacher_mean: Tensor, teacher_std: Tensor) -> Tensor:
    """Return (h − μ_S) / (σ_S + 1e-6) · σ_T + μ_T, per channel over images and cells, (N, C, H, W).

    What CrossKD (see `crosskd_cls_loss`) does to the student's hold features before the teacher's head reads them; μ_S
    and σ_S are the batch's, σ_S unbiased, and gradient flows through both. A channel that is constant becomes μ_T.

    Args:
        student: h, (N, C, H, W), before the activation and after the adapter.
        teacher_mean: μ_T, (C,), of the same batch; never receives gradient.
        teacher_std: σ_T, (C,), unbiased; never receives gradient.

    Raises:
        MismatchError: the channels differ.
    """
    student = at_least_float32(student)
    for values in (teacher_mean, teacher_std):
        if values.shape != student.shape[1:2]:
            raise MismatchError(
                f"the teacher's statistics are of shape {tuple(values.shape)}; allowed: one value a channel, "
                f"{tuple(student.shape[1:2])}"
            )
    cells = student.shape[0] * student.shape[2] * student.shape[3]
    centred = student - student.mean((0, 2, 3), keepdim=True)
    spread = student.std((0, 2, 3), correction=min(cells - 1, 1), keepdim=True) if cells else student.new_ones(())
    mean, std = (values.detach().to(student.dtype)[:, None, None] for values in (teacher_mean, teacher_std))
    return centred / (spread + EPSILON) * std + mean


def batch_statistics(mean: Tensor, m2: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation of each channel over a batch, (C,) each, in float64.

    Exactly those of the images in a row: Σ m2_b + cells · Σ (mean_b − mean)², over B · cells − 1. One cell in all has
    deviation 0.

    Args:
        mean: (B, C) means over the cells of each image.
        m2: (B, C) sums of squared deviations from them.
        cells: cells of an image's map, the same for all.
    """
    mean, m2 = mean.detach().double(), m2.detach().double()
    centre = mean.mean(0)
    squares = m2.sum(0) + cells * (mean - centre).square().sum(0)
    return centre, (squares / max(len(mean) * cells - 1, 1)).sqrt()


@dataclass(frozen=True)
class _Crossing:
    """Where maps cross over to the teacher's head: the branches that read the map, and its slot in either head."""

    level: int
    branches: tuple[str, ...]
    ours: int
    theirs: int


class CrossKD(DistillLoss):
    """`crosskd_cls_loss` / Z + `box_weight` · `crosskd_box_loss` / Σ weights, on the cross logits of all levels.

    The student's map after `position` convolutions of each branch (0: the head's input) goes through a 1x1 convolution
    where channels differ, `align_scale` to the teacher's statistics of the same batch, and the rest of the teacher's
    frozen head. That convolution has no bias: `align_scale` takes the mean away again, so its gradient would be
    rounding noise. The statistics of both are those of the part of a batch that one device has, the teacher's exact
    from the stored sums.

    Classes: all anchors, Z = max(Σ max_c p_t, 1). Boxes: sent anchors with max_c p_t > 0.05, weighted by max_c p_t and
    divided by the sum of these weights; on a teacher without bins `bckd_box_loss` of the decoded boxes, for which the
    authors' outer weight is 1 (box_weight=1). The student's own bins do not matter: the answers are the teacher's.
    """

    name = "crosskd"
    title = "what the teacher's head answers to the student's maps"
    paper = "CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024"
    needs = frozenset({"logits", "hold_stats"})
    reads = frozenset({"hold", "head"})
    default_weight = 0.12
    cost = "the rest of the teacher's head, forward and backward; 1x1 convolution where channels differ"
    protocol = "sigmoid"
    batch_rule = "statistics"
    allowed: ClassVar[Mapping[str, Allowed]] = {
        "position": whole(0, 2),
        "beta": at_least(1),
        "box_weight": at_least(0),
    }

    def __init__(
        self, teacher: HeadSpec, student: HeadSpec, *, position: int = 1, beta: float = 1.0, box_weight: float = 4.0
    ) -> None:
        super().__init__(teacher, student, position=position, beta=beta, box_weight=box_weight)
        for head, whose in ((teacher, "teacher"), (student, "student")):
            _check_depth(head, whose, position)
        self.position = position
        self.beta = beta
        self.box_weight = box_weight
        self.reg_max = teacher.reg_max
        self.hold = list(teacher.hold)
        self._crossings = _crossings(teacher, student, position)
        pairs = [
            (Tap("student's hold", student.hold[each.ours], 0), Tap("teacher's hold", teacher.hold[each.theirs], 0))
            for each in self._crossings
        ]
        self.adapters = channel_adapters(pairs, bias=False)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        scores, boxes = (self.required(values, "logits") for values in (targets.scores, targets.boxes))
        cross_scores, cross_boxes = self._cross_logits(student, targets)
        sure = confidence(scores)
        loss = crosskd_cls_loss(
            cross_scores.flatten(0, 1), scores.flatten(0, 1), beta=self.beta, normalizer=total_confidence(sure)
        )
        chosen = box_anchors(sure, targets.sent)
        return loss + self.box_weight * self._box_term(cross_boxes[chosen], boxes[chosen], sure[chosen])

    def _box_term(self, cross: Tensor, boxes: Tensor, weight: Tensor) -> Tensor:
        # The sum is above MIN_BOX_SCORE as soon as there is one anchor.
        total = weight.sum().clamp(min=MIN_BOX_SCORE)
        if self.reg_max == 1:
            return bckd_box_loss(decode_boxes(cross, 1), decode_boxes(boxes, 1), weight=weight, normalizer=total)
        shape = (-1, 4, self.reg_max)
        return crosskd_box_loss(cross.view(shape), boxes.view(shape), weight=weight, normalizer=total)

    def _cross_logits(self, student: DetectorOutput, targets: TargetBatch) -> tuple[Tensor, Tensor]:
        """Return the teacher's head's logits on the student's maps: classes (B, A, C) as the student's, boxes."""
        maps = self.required(student.hold or None, "the student's hold maps")
        mean = torch.split(self.required(targets.hold_mean, "hold statistics"), self.hold, 1)
        m2 = torch.split(self.required(targets.hold_m2, "hold statistics"), self.hold, 1)
        logits: dict[str, list[Tensor]] = {"cls": [], "box": []}
        for crossing, adapter in zip(self._crossings, self.adapters, strict=True):
            values = adapter(at_least_float32(maps[crossing.ours]))
            cells = values.shape[2] * values.shape[3]
            aligned = align_scale(values, *batch_statistics(mean[crossing.theirs], m2[crossing.theirs], cells))
            for branch in crossing.branches:
                answer = self.frozen_head.finish(crossing.level, branch, self.position, aligned)
                logits[branch].append(answer.flatten(2).transpose(1, 2))
        scores, boxes = torch.cat(logits["cls"], 1), torch.cat(logits["box"], 1)
        return (scores if self.class_map is None else scores[..., list(self.class_map)]), boxes


def _crossings(teacher: HeadSpec, student: HeadSpec, position: int) -> tuple[_Crossing, ...]:
    """Return the maps of all levels; at the head's input both branches read one map."""
    groups = (("box",), ("cls",)) if position else (("box", "cls"),)
    return tuple(
        _Crossing(level, group, *(head.hold_slot(level, group[0], position) for head in (student, teacher)))
        for level in range(len(teacher.taps))
        for group in groups
    )


def _check_depth(head: HeadSpec, whose: str, position: int) -> None:
    if head.hold and position <= head.hold_positions:
        return
    known = f"0 to {head.hold_positions}" if head.hold else "none"
    raise MismatchError(
        f"loss crosskd: position={position} is a map that the {whose}'s head does not have; its positions: {known}; "
        "choose one that both heads have, or --loss bckd"
    )
