"""In: feature maps of two layers each. Out: how differently the layers' channels go together (FSP)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses.maps import MapLoss, channel_adapters
from cache_kd.losses.numeric import comparable
from cache_kd.losses.options import Allowed, one_of
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

Pair = tuple[Tensor, Tensor]
REDUCTIONS = ("sum", "mean")


def fsp_loss(student: Pair, teacher: Pair, *, reduction: str = "sum") -> Tensor:
    """Return the loss of one flow matrix, that of two layers.

    1/N · Σ_n Σ_ab (G_ab(S) − G_ab(T))² with G_ab = 1/(HW) · Σ_hw X_a·Y_b for the channels a of one layer and b of the
    other. Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
    Learning", CVPR 2017. The larger map is max-pooled to the smaller one's size, by one window where that divides it,
    else by windows that may overlap by a cell. Mean over images, sum over entries; 0 when the matrices are equal.

    The paper has layers of one resolution and λ = 1; its code was not found. RepDistiller pools by averages and takes
    the mean over a and b, as reduction="mean" does, F·F' times smaller; torchdistill adds unsquared column norms.

    Args:
        student: X (N, F, H, W) and Y (N, F', H', W'), after the adapters.
        teacher: two maps of the same shapes; never receive gradient.
        reduction: of the squares over a and b, "sum" or "mean".
    """
    if reduction not in REDUCTIONS:
        raise SettingError(f"reduction={reduction!r} is not allowed; allowed: {', '.join(REDUCTIONS)}")
    (low, their_low), (high, their_high) = (comparable(*maps) for maps in zip(student, teacher, strict=True))
    if low.shape[0] != high.shape[0]:
        raise MismatchError(f"maps of {low.shape[0]} and {high.shape[0]} images; allowed: layers of the same images")
    if not (low.numel() and high.numel()):
        return low.sum() * 0 + high.sum() * 0
    ours, theirs = _flow(low, high), _flow(their_low, their_high)
    squares = F.mse_loss(ours, theirs, reduction="none").flatten(1)
    return (squares.sum(1) if reduction == "sum" else squares.mean(1)).mean()


class FSP(MapLoss):
    """`fsp_loss` summed over consecutive layers: (P3, P4) and (P4, P5), or each two in a row of `layers`.

    Where channel numbers differ, a 1x1 convolution lifts the student's map, one a layer.
    """

    name = "fsp"
    title = "which channels of one layer go together with which of the next"
    paper = "A Gift from Knowledge Distillation, CVPR 2017"
    default_weight = 0.00015
    cost = "one max pool and one product of all channels a pair of layers; 1x1 convolution where channels differ"
    allowed: ClassVar[Mapping[str, Allowed]] = {**MapLoss.allowed, "reduction": one_of(*REDUCTIONS)}

    def __init__(
        self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = (), reduction: str = "sum"
    ) -> None:
        super().__init__(teacher, student, layers=layers, reduction=reduction)
        if len(self.pairs) < 2:
            got = ", ".join(theirs.name for _, theirs in self.pairs) or "none"
            raise SettingError(
                f"loss fsp compares how two layers go together, got layers {got}; "
                "allowed: two layers or more, for example fsp:layers=P3,P4"
            )
        self.reduction = reduction
        self.adapters = channel_adapters(self.pairs)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        pairs = zip(self.adapters, self.maps(student, targets), strict=True)
        maps = [(adapter(ours), theirs) for adapter, (ours, theirs) in pairs]
        losses = [
            fsp_loss((ours, ours_next), (theirs, theirs_next), reduction=self.reduction)
            for (ours, theirs), (ours_next, theirs_next) in pairwise(maps)
        ]
        return sum(losses[1:], losses[0])


def _flow(low: Tensor, high: Tensor) -> Tensor:
    """Return G (N, F, F') of maps (N, F, H, W) and (N, F', H', W')."""
    size = (min(low.shape[2], high.shape[2]), min(low.shape[3], high.shape[3]))
    low, high = _pooled(low, size).flatten(2), _pooled(high, size).flatten(2)
    return low @ high.transpose(1, 2) / low.shape[2]


def _pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    sides = (maps.shape[2], maps.shape[3])
    if sides == size:
        return maps
    if sides[0] % size[0] or sides[1] % size[1]:
        return F.adaptive_max_pool2d(maps, size)
    return F.max_pool2d(maps, (sides[0] // size[0], sides[1] // size[1]))
