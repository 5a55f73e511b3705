"""In: feature maps and the teacher's score map. Out: their squared difference where the teacher sees objects (SL2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_kd.errors import MismatchError
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.numeric import at_least_float32, comparable
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def sl2_loss(student: Tensor, teacher: Tensor, teacher_score: Tensor) -> Tensor:
    """Return the score-weighted squared difference of one level.

    Σ (P(S) − T)²·w / (F·Σ w + 1e-9), sums over the batch: a weighted mean over cells and channels; 0 at P(S) = T. The
    distillation loss of Ultralytics 8.4 (`DistillationModel.loss_sl2`, 2026); no paper. Its code multiplies by `dis`
    (6.0) and the batch size outside.

    Args:
        student: (N, F, H, W), after the projector P.
        teacher: (N, F, H, W), never receives gradient.
        teacher_score: w, (N, 1, H·W), the teacher's largest class probability at each cell; never receives gradient.
    """
    student, teacher = comparable(student, teacher)
    weight = teacher_score.detach().to(student.dtype)
    cells = (student.shape[0], 1, student.shape[2] * student.shape[3])
    if weight.shape != cells:
        raise MismatchError(f"teacher_score is of shape {tuple(weight.shape)}; allowed: one value a cell, {cells}")
    squares = F.mse_loss(student.flatten(2), teacher.flatten(2), reduction="none")
    return (squares * weight).sum() / (weight.sum() * student.shape[1] + 1e-9)


class SL2(DistillLoss):
    """`sl2_loss` summed over levels, behind a projector whose state dict equals that of Ultralytics' own."""

    name = "sl2"
    title = "the neck's maps where the teacher sees objects"
    paper = "Ultralytics 8.4 knowledge distillation (no paper), 2026"
    needs = frozenset({"features", "score_map"})
    default_weight = 6.0
    cost = "two 1x1 convolutions and one squared difference a map"

    def __init__(self, teacher: HeadSpec, student: HeadSpec) -> None:
        super().__init__(teacher, student)
        self.projector = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(ours.channels, theirs.channels, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(theirs.channels, theirs.channels, 1),
            )
            for ours, theirs in zip(student.taps, teacher.taps, strict=True)
        )

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        maps = self.required(targets.features, "features")
        sizes = [m.shape[2] * m.shape[3] for m in maps]
        scores = torch.split(self.required(targets.score_map, "score maps"), sizes, 1)
        levels = zip(self.projector, student.features, maps, scores, strict=True)
        losses = [
            sl2_loss(projector(at_least_float32(ours)), theirs, score.unsqueeze(1))
            for projector, ours, theirs, score in levels
        ]
        return sum(losses[1:], losses[0])
