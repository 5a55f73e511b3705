"""In: feature maps. Out: how differently teacher and student spread each channel over the positions (CWD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cache_kd.losses.base import DistillLoss
from cache_kd.losses.numeric import at_least_float32, comparable
from cache_kd.losses.options import Allowed, above
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the channel-wise distillation loss of one level.

    τ² / (N·F) · Σ_n Σ_f KL(softmax_HW(T/τ) ‖ softmax_HW(S/τ)). Shu et al., "Channel-wise Knowledge Distillation for
    Dense Prediction", ICCV 2021. Sum over positions, mean over images and channels; 0 when the maps differ at most by
    one constant a channel. The code for mmdetection takes the cross-entropy instead: another value, the same gradient.

    Args:
        student: (N, F, H, W), after the adapter.
        teacher: (N, F, H, W), never receives gradient.
        temperature: τ, 1 for detection necks (4 for segmentation logits).
    """
    student, teacher = comparable(student, teacher)
    ours = (student.flatten(2) / temperature).log_softmax(-1)
    theirs = (teacher.flatten(2) / temperature).log_softmax(-1)
    divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return divergence * (temperature**2 / max(student.shape[0] * student.shape[1], 1))


class CWD(DistillLoss):
    """`cwd_loss` summed over levels.

    Where channel numbers differ, a 1x1 convolution lifts the student's map. It has no bias: the softmax over positions
    cannot see one, so its gradient would be rounding noise, which Adam turns into full steps.
    """

    name = "cwd"
    title = "where each channel of the neck is active, as a distribution over positions"
    paper = "Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    needs = frozenset({"features"})
    default_weight = 2.7
    cost = "two softmaxes over every map; 1x1 convolution where channels differ"
    allowed: ClassVar[Mapping[str, Allowed]] = {"temperature": above(0)}

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, temperature: float = 1.0) -> None:
        super().__init__(teacher, student, temperature=temperature)
        self.temperature = temperature
        self.adapters = nn.ModuleList(
            nn.Identity()
            if ours.channels == theirs.channels
            else nn.Conv2d(ours.channels, theirs.channels, 1, bias=False)
            for ours, theirs in zip(student.taps, teacher.taps, strict=True)
        )

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        levels = zip(self.adapters, student.features, self.required(targets.features, "features"), strict=True)
        losses = [
            cwd_loss(adapter(at_least_float32(ours)), theirs, temperature=self.temperature)
            for adapter, ours, theirs in levels
        ]
        return sum(losses[1:], losses[0])
