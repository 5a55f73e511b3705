"""In: feature maps and the teacher's score map. Out: their squared difference where the teacher sees objects (SL2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_kd.errors import MismatchError
from cache_kd.losses.maps import MapLoss
from cache_kd.losses.numeric import comparable
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


class SL2(MapLoss):
    """`sl2_loss` summed over the pairs, behind a projector whose state dict equals that of Ultralytics' own.

    A layer that is no input of the head is weighted by the scores of the level of its stride.
    """

    name = "sl2"
    title = "the neck's maps where the teacher sees objects"
    paper = "Ultralytics 8.4 knowledge distillation (no paper), 2026"
    needs = frozenset({"features", "score_map"})
    default_weight = 6.0
    cost = "two 1x1 convolutions and one squared difference a map"

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = ()) -> None:
        super().__init__(teacher, student, layers=layers)
        self._level_of = self.levels_of_strides(teacher)
        self.projector = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(ours.channels, theirs.channels, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(theirs.channels, theirs.channels, 1),
            )
            for ours, theirs in self.pairs
        )

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        sizes = [level.shape[2] * level.shape[3] for level in student.features]
        scores = torch.split(self.required(targets.score_map, "score maps"), sizes, 1)
        pairs = zip(self.projector, self.maps(student, targets), self._level_of, strict=True)
        losses = [
            sl2_loss(projector(ours), theirs, scores[level].unsqueeze(1)) for projector, (ours, theirs), level in pairs
        ]
        return sum(losses[1:], losses[0])
