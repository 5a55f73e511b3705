"""In: feature maps. Out: how differently teacher and student spread each channel over the positions (CWD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from cache_kd.losses.maps import MapLoss, channel_adapters
from cache_kd.losses.numeric import comparable
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


class CWD(MapLoss):
    """`cwd_loss` summed over the pairs of maps.

    Where channel numbers differ, a 1x1 convolution lifts the student's map. It has no bias: the softmax over positions
    cannot see one, so its gradient would be rounding noise, which Adam turns into full steps.
    """

    name = "cwd"
    title = "where each channel of the neck is active, as a distribution over positions"
    paper = "Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    default_weight = 5.4
    cost = "two softmaxes over every map; 1x1 convolution where channels differ"
    allowed: ClassVar[Mapping[str, Allowed]] = {**MapLoss.allowed, "temperature": above(0)}

    def __init__(
        self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = (), temperature: float = 1.0
    ) -> None:
        super().__init__(teacher, student, layers=layers, temperature=temperature)
        self.temperature = temperature
        self.adapters = channel_adapters(self.pairs, bias=False)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        pairs = zip(self.adapters, self.maps(student, targets), strict=True)
        losses = [cwd_loss(adapter(ours), theirs, temperature=self.temperature) for adapter, (ours, theirs) in pairs]
        return sum(losses[1:], losses[0])
