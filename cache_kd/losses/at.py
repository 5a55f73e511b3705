"""In: feature maps. Out: how differently teacher and student spread their energy over the positions (AT)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cache_kd.losses.maps import MapLoss
from cache_kd.losses.numeric import comparable_maps
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the attention transfer loss of one level.

    mean_{n,hw} (Q(S) − Q(T))² with Q(F) = vec(mean_f F²) / ‖vec(mean_f F²)‖₂, for each image. Zagoruyko, Komodakis,
    "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention
    Transfer", ICLR 2017. Mean over images and positions; 0 when the energies are proportional, whatever the signs, the
    order or the number of channels. An all-zero map has Q = 0 and gets no gradient.

    This is the authors' code, which has β = 1000 in front; the paper adds β/2 · ‖Q(S) − Q(T)‖₂, not squared. Q has
    norm 1, so the mean makes the value fall as 1/(H·W): 64 times weaker on an 80x80 map than on a 10x10 one.

    Args:
        student: (N, F, H, W).
        teacher: (N, F', H, W), never receives gradient; F' may differ from F.
    """
    student, teacher = comparable_maps(student, teacher)
    ours, theirs = (F.normalize(maps.square().mean(1).flatten(1), dim=1) for maps in (student, teacher))
    return F.mse_loss(ours, theirs) if ours.numel() else student.sum()


class AT(MapLoss):
    """`at_loss` summed over the pairs of maps; channels may differ, so nothing is trained beside the student."""

    name = "at"
    title = "how the neck's energy is spread over positions, one map a level"
    paper = "Paying More Attention to Attention, ICLR 2017"
    default_weight = 30.0
    cost = "one squared mean over the channels of every map"

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = ()) -> None:
        super().__init__(teacher, student, layers=layers)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        losses = [at_loss(ours, theirs) for ours, theirs in self.maps(student, targets)]
        return sum(losses[1:], losses[0])
