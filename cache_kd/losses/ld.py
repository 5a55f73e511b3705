"""In: DFL box logits. Out: the divergence of the distributions over each side's distance (LD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from cache_kd.errors import MismatchError
from cache_kd.losses.anchors import box_anchors, confidence, total_confidence
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.numeric import comparable, sum_rows
from cache_kd.losses.options import Allowed, above
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def ld_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 10.0,
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the localization distillation loss, Σ_a weight_a · row_a / normalizer.

    row_a = T² · Σ_{l,t,r,b} (1/R) · KL(softmax(t/T) ‖ softmax(s/T)): the sum of four sides, each averaged over its R
    bins as in the authors' code (a plain KL sums the bins and is R times larger). Zheng et al., "Localization
    Distillation for Dense Object Detection", CVPR 2022. Sum over rows if `normalizer` is None. 0 at student = teacher.

    The authors' code multiplies 0.25 (loss weight) outside and divides by a constant `avg_factor`, here `normalizer`:
    4.0 on positives, weighted by the student's largest class probability; 16.0 on the valuable localization region,
    weighted by the anchor's IoU with the object. It thus grows with the number of positives.

    Args:
        student: (n, 4, R) logits.
        teacher: (n, 4, R) logits, never receives gradient; a constant added to a side's logits changes nothing.
        temperature: T, above 0.
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is 1.
    """
    student, teacher = comparable(student, teacher)
    ours, theirs = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    sides = F.kl_div(ours, theirs, reduction="none", log_target=True).mean(-1) * temperature**2
    return sum_rows(sides.sum(-1), weight, normalizer)


class LD(DistillLoss):
    """`ld_loss` on sent anchors with max_c p_t > 0.05, weighted by it, divided by Z = max(Σ max_c p_t, 1)."""

    name = "ld"
    title = "the distribution of each box side's distance where the teacher sees objects"
    paper = "Localization Distillation for Dense Object Detection, CVPR 2022"
    needs = frozenset({"logits"})
    default_weight = 4.2
    cost = "softmax over the bins of few anchors"
    allowed: ClassVar[Mapping[str, Allowed]] = {"temperature": above(0)}

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, temperature: float = 10.0) -> None:
        super().__init__(teacher, student, temperature=temperature)
        if teacher.reg_max < 2 or teacher.reg_max != student.reg_max:
            raise MismatchError(
                f"loss ld compares bins of box sides: the teacher's reg_max is {teacher.reg_max}, "
                f"the student's {student.reg_max}; allowed: equal and at least 2; use --loss bckd or --loss sl2"
            )
        self.reg_max = student.reg_max
        self.temperature = temperature

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        boxes = self.required(targets.boxes, "logits")
        sure = confidence(self.required(targets.scores, "logits"))
        chosen = box_anchors(sure, targets.sent)
        shape = (-1, 4, self.reg_max)
        return ld_loss(
            student.boxes[chosen].view(shape),
            boxes[chosen].view(shape),
            temperature=self.temperature,
            weight=sure[chosen],
            normalizer=total_confidence(sure),
        )
