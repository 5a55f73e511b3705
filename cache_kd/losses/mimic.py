"""In: feature maps. Out: their mean squared difference after a 1x1 convolution on the student's side (MIMIC)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cache_kd.losses.maps import MapLoss
from cache_kd.losses.numeric import comparable
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def mimic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of one level, over images, channels and cells.

    mean (φ(S) − T)². After Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, as detectors use it (the
    paper has ½ the sum of squares, a fixed multiple for maps of one size). 0 at φ(S) = T.

    Args:
        student: (N, F, H, W), after the adapter φ.
        teacher: (N, F, H, W), never receives gradient.
    """
    student, teacher = comparable(student, teacher)
    return F.mse_loss(student, teacher) if student.numel() else student.sum()


class MIMIC(MapLoss):
    """`mimic_loss` summed over the pairs, after a 1x1 convolution with bias a pair, equal channels included."""

    name = "mimic"
    title = "the neck's maps themselves, value by value"
    paper = "FitNets: Hints for Thin Deep Nets, ICLR 2015"
    default_weight = 6.0
    cost = "1x1 convolution and one squared difference a map"

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = ()) -> None:
        super().__init__(teacher, student, layers=layers)
        self.adapters = nn.ModuleList(nn.Conv2d(ours.channels, theirs.channels, 1) for ours, theirs in self.pairs)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        pairs = zip(self.adapters, self.maps(student, targets), strict=True)
        losses = [mimic_loss(adapter(ours), theirs) for adapter, (ours, theirs) in pairs]
        return sum(losses[1:], losses[0])
