"""In: DFL box logits. Out: the divergence of the distributions over each side's distance (LD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.errors import MismatchError
from cache_kd.losses.anchors import box_anchors, confidence, rows_at, total_confidence
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.labels import boxes_by_image
from cache_kd.losses.numeric import comparable, sum_rows
from cache_kd.losses.options import Allowed, Option, above, at_least, one_of
from cache_kd.losses.vlr import vlr_weights
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

REGIONS = ("teacher", "assigned")
Anchors = tuple[Tensor, Tensor]
"""Image and anchor indices, (n,) each."""


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
    """`ld_loss` on the main region plus `vlr` times that on the valuable localization region, both divided by one Z.

    Main region "teacher": sent anchors with max_c p_t > 0.05, weighted by it, Z = max(Σ max_c p_t, 1) over the batch;
    no label or assignment is read. "assigned": the positives of the student's own assigner, weighted by their quality,
    Z = max(Σ quality, 1), the weights and divisor of Ultralytics' own DFL loss.

    The valuable region, see `vlr_weights`, follows from the labels; its weight is IoU(anchor box, object). In the
    authors' code both parts have weight 0.25, the main one over 4, this one over 16, so that vlr=0.25 is theirs. One Z
    for both keeps that ratio of sums and makes either a mean over images. An anchor in both regions counts in both, as
    in their code. A cache for it is extracted with --store vlr; anchors that were not sent teach nothing.
    """

    name = "ld"
    title = "the distribution of each box side's distance where the teacher sees objects"
    paper = "Localization Distillation for Dense Object Detection, CVPR 2022"
    needs = frozenset({"logits"})
    default_weight = 4.2
    cost = "softmax over the bins of few anchors"
    allowed: ClassVar[Mapping[str, Allowed]] = {
        "temperature": above(0),
        "region": one_of(*REGIONS),
        "vlr": at_least(0),
    }

    def __init__(
        self,
        teacher: HeadSpec,
        student: HeadSpec,
        *,
        temperature: float = 10.0,
        region: str = "teacher",
        vlr: float = 0.0,
    ) -> None:
        super().__init__(teacher, student, temperature=temperature, region=region, vlr=vlr)
        if teacher.reg_max < 2 or teacher.reg_max != student.reg_max:
            raise MismatchError(
                f"loss ld compares bins of box sides: the teacher's reg_max is {teacher.reg_max}, "
                f"the student's {student.reg_max}; allowed: equal and at least 2; use --loss bckd or --loss sl2"
            )
        self.reg_max = student.reg_max
        self.temperature = temperature
        self.region = region
        self.vlr = vlr
        self.strides = tuple(tap.stride for tap in teacher.taps)

    @classmethod
    def needs_for(cls, options: Mapping[str, Option]) -> frozenset[str]:
        return cls.needs | {"vlr"} if options.get("vlr") else cls.needs

    @classmethod
    def reads_for(cls, options: Mapping[str, Option]) -> frozenset[str]:
        read = {"labels": bool(options.get("vlr")), "assignment": options.get("region") == "assigned"}
        return cls.reads | {name for name, wanted in read.items() if wanted}

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        self.required(targets.boxes, "logits")
        chosen, weight, total = self._main_region(student, targets)
        loss = self._part(student, targets, chosen, weight, total)
        if self.vlr:
            chosen, weight = self._valuable_region(student, targets)
            loss = loss + self.vlr * self._part(student, targets, chosen, weight, total)
        return loss

    def _main_region(self, student: DetectorOutput, targets: TargetBatch) -> tuple[Anchors, Tensor, Tensor]:
        """Return the anchors, their weights, and Z."""
        if self.region == "teacher":
            sure = confidence(self.required(targets.scores, "logits"))
            chosen = box_anchors(sure, targets.sent)
            return chosen, sure[chosen], total_confidence(sure)
        assigned = self.required(student.assigned, "the student's assignment")
        chosen = _sent_anchors(assigned.positive, targets.sent)
        return chosen, assigned.quality[chosen], total_confidence(assigned.quality)

    def _valuable_region(self, student: DetectorOutput, targets: TargetBatch) -> tuple[Anchors, Tensor]:
        labels = self.required(targets.labels, "labels")
        grids = [(level.shape[2], level.shape[3]) for level in student.features]
        boxes = boxes_by_image(labels, len(student.boxes))
        valuable = vlr_weights(boxes, grids=grids, strides=self.strides)
        chosen = _sent_anchors(valuable > 0, targets.sent)
        return chosen, valuable[chosen]

    def _part(
        self, student: DetectorOutput, targets: TargetBatch, chosen: Anchors, weight: Tensor, total: Tensor
    ) -> Tensor:
        shape = (-1, 4, self.reg_max)
        return ld_loss(
            rows_at(student.boxes, chosen).view(shape),
            rows_at(self.required(targets.boxes, "logits"), chosen).view(shape),
            temperature=self.temperature,
            weight=weight,
            normalizer=total,
        )


def _sent_anchors(mask: Tensor, sent: Tensor | None) -> Anchors:
    images, anchors = torch.nonzero(mask if sent is None else mask & sent, as_tuple=True)
    return images, anchors
