"""In: maps of class logits. Out: the divergence of the class probabilities, a mean over the cells (PI)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from cache_kd.losses.base import DistillLoss
from cache_kd.losses.level_maps import level_maps
from cache_kd.losses.numeric import comparable
from cache_kd.losses.options import Allowed, one_of
from cache_kd.losses.protocols import (
    PROTOCOLS,
    binary_divergence,
    is_sigmoid,
    refuse_softmax_of_one,
    softmax_divergence,
)
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def pi_loss(student: Tensor, teacher: Tensor, *, protocol: str = "sigmoid") -> Tensor:
    """Return the pixel-wise distillation loss of one map of class logits.

    1 / (N·H·W) · Σ_n Σ_cells KL(teacher ‖ student). Liu et al., "Structured Knowledge Distillation for Semantic
    Segmentation", CVPR 2019, with λ = 10 outside. Sum over classes, mean over cells and images; 0 at student = teacher.

    softmax: KL(softmax(t) ‖ softmax(s)) over the classes, the paper's form; blind to a constant added to all logits of
    a cell, and always 0 for one class. sigmoid: Σ_c KL(Bern(σ(t_c)) ‖ Bern(σ(s_c))), for heads trained with binary
    cross-entropy. The authors' code (SKD) takes the cross-entropy, whose gradient is the same, and does not divide by
    N; that of IFVD takes the mean over classes too, N·C·H·W.

    Args:
        student: (N, C, H, W) logits.
        teacher: (N, C, H, W) logits, never receives gradient.
        protocol: "sigmoid" or "softmax".
    """
    sigmoid = is_sigmoid(protocol)
    student, teacher = comparable(student, teacher)
    cells = student.shape[0] * student.shape[2:].numel()
    if sigmoid:
        total = binary_divergence(student, teacher).sum()
    else:
        total = softmax_divergence(student.movedim(1, -1), teacher.movedim(1, -1)).sum()
    return total / max(cells, 1)


class PI(DistillLoss):
    """`pi_loss` of the class logits of each level, summed over the levels.

    Every cell of a level counts alike and every level in full, so a cell of P5 weighs as much as 16 of P3. Where the
    cache holds a few anchors only, the others have the mean logit of what was left out.
    """

    name = "pi"
    title = "class probabilities at every cell, averaged by level"
    paper = "Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019"
    needs = frozenset({"logits"})
    default_weight = 5.0
    cost = "elementwise on the class logits"
    protocol = "sigmoid"
    allowed: ClassVar[Mapping[str, Allowed]] = {"protocol": one_of(*PROTOCOLS)}

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, protocol: str = "sigmoid") -> None:
        super().__init__(teacher, student, protocol=protocol)
        refuse_softmax_of_one(self.name, protocol, student.num_classes)
        self.mode = protocol

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        scores = self.required(targets.scores, "logits")
        pairs = zip(level_maps(student.scores, student.features), level_maps(scores, student.features), strict=True)
        losses = [pi_loss(ours, theirs, protocol=self.mode) for ours, theirs in pairs]
        return sum(losses[1:], losses[0])
