"""In: outputs, targets and the student's assignment. Out: class logits of rows that have a class (NKD, DKD, WSLD)."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cache_kd.errors import MismatchError
from cache_kd.losses.anchors import box_anchors, confidence, total_confidence
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.numeric import at_least_float32
from cache_kd.losses.options import Allowed, Option, above, one_of
from cache_kd.losses.protocols import PROTOCOLS, refuse_softmax_of_one
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

REGIONS = ("assigned", "teacher")

Rows = tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]
"""Image and anchor indices, (n,) each; class (n,); weight (n,); divisor, a scalar."""


class LabelledRows(DistillLoss, ABC):
    """A method on class logits that tells a row's own class from the others, and so wants rows that have one.

    region=assigned: the anchors that the student's own assigner calls positive, each with its object's class and
    weighted by its quality, divided by max(Σ quality, 1): as Ultralytics' own losses are. A sparse cache has them all,
    for it sends every anchor centred in a labelled box.
    region=teacher, without labels: the sent anchors with max_c p_t > 0.05, each with the teacher's best class and
    weighted by max_c p_t, divided by Z = max(Σ max_c p_t, 1).

    Attributes:
        function: the method's pure function; it gets all options but `region` by name.
    """

    needs = frozenset({"logits"})
    reads = frozenset({"assignment"})
    cost = "elementwise on the class logits of few anchors"
    protocol = "sigmoid"
    function: ClassVar[Callable[..., Tensor]]
    allowed: ClassVar[Mapping[str, Allowed]] = {
        "temperature": above(0),
        "protocol": one_of(*PROTOCOLS),
        "region": one_of(*REGIONS),
    }

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, region: str, protocol: str, **options: Option) -> None:
        super().__init__(teacher, student, region=region, protocol=protocol, **options)
        refuse_softmax_of_one(self.name, protocol, student.num_classes)
        self.region = region
        self.options: dict[str, Option] = {"protocol": protocol, **options}

    @classmethod
    def reads_for(cls, options: Mapping[str, Option]) -> frozenset[str]:
        return frozenset() if options.get("region") == "teacher" else cls.reads

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        scores = self.required(targets.scores, "logits")
        rows = self._assigned(student) if self.region == "assigned" else self._seen(scores, targets.sent)
        chosen, target, weight, normalizer = rows
        return self.function(
            student.scores[chosen], scores[chosen], target, weight=weight, normalizer=normalizer, **self.options
        )

    def _assigned(self, student: DetectorOutput) -> Rows:
        assigned = student.assigned
        if assigned is None:
            raise MismatchError(
                f"loss {self.name} needs the student's assignment, which this step lacks; "
                f"use --loss {self.name}:region=teacher"
            )
        images, anchors = torch.nonzero(assigned.positive, as_tuple=True)
        quality = at_least_float32(assigned.quality)
        chosen = images, anchors
        return chosen, assigned.cls[chosen], quality[chosen], quality[chosen].sum().clamp(min=1.0)

    def _seen(self, scores: Tensor, sent: Tensor | None) -> Rows:
        sure = confidence(scores)
        chosen = box_anchors(sure, sent)
        return chosen, scores[chosen].detach().argmax(-1), sure[chosen], total_confidence(sure)
