"""In: feature maps. Out: how differently the patches of teacher and student resemble each other (PA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.errors import SettingError
from cache_kd.losses.maps import MapLoss
from cache_kd.losses.numeric import comparable_maps
from cache_kd.losses.options import Allowed, between
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

LARGEST = 400
"""Nodes of the pooled map at most, a 20x20 grid: every node is compared with every other."""


def pa_loss(student: Tensor, teacher: Tensor, *, scale: float = 0.5) -> Tensor:
    """Return the pair-wise similarity loss of one level.

    Σ_n Σ_ij (a_ij(T) − a_ij(S))² / (n² · N), a_ij = f_i·f_j, over the n nodes of the max-pooled map. Liu et al.,
    "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019. Mean over images and pairs; 0 when all
    similarities agree, and for a single node up to rounding.

    This is the authors' code. A node is the largest value of each channel in a patch of int(H·scale) x int(W·scale)
    cells, at least one, the last patches being smaller: scale 0.5 leaves 2x2 nodes on an even map (the paper averages
    over patches of β cells). f = x / (‖x‖₂ + 1e-8) takes the norm as a constant, so its gradient is not that of a
    cosine. A node of zeros gets no gradient here; in the authors' code it gets 1e8 times that of a node of norm 1.

    Args:
        student: (N, F, H, W).
        teacher: (N, F', H, W), never receives gradient; F' may differ from F.
        scale: side of a patch, as a share of the map's side.

    Raises:
        SettingError: more than 400 nodes (20x20) would be left; memory grows with the square of their number.
    """
    student, teacher = comparable_maps(student, teacher)
    size = (student.shape[2], student.shape[3])
    if not student.shape[0] * size[0] * size[1]:
        return student.sum()
    if _nodes(size, scale) > LARGEST:
        allowed = next(thousandth for thousandth in range(1, 1001) if _nodes(size, thousandth / 1000) <= LARGEST)
        raise SettingError(
            f"scale={scale:g} leaves {_nodes(size, scale)} nodes of a {size[0]}x{size[1]} map, each compared with "
            f"each; allowed: at most {LARGEST} nodes, scale from {allowed / 1000:g} on this map"
        )
    ours, theirs = (_similarities(F.max_pool2d(m, _patch(size, scale), ceil_mode=True)) for m in (student, teacher))
    return F.mse_loss(ours, theirs)


class PA(MapLoss):
    """`pa_loss` summed over the pairs of maps; channels may differ, so nothing is trained beside the student."""

    name = "pa"
    title = "how much the patches of the neck's maps resemble each other"
    paper = "Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019"
    default_weight = 0.7
    cost = "one max pool a map and a product of every node with every other, 400 nodes at most"
    # At scale 1 one node is left, which resembles itself: a term that is always 0.
    allowed: ClassVar[Mapping[str, Allowed]] = {**MapLoss.allowed, "scale": between(0.05, 0.95)}

    def __init__(
        self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = (), scale: float = 0.5
    ) -> None:
        super().__init__(teacher, student, layers=layers, scale=scale)
        self.scale = scale

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        losses = [pa_loss(ours, theirs, scale=self.scale) for ours, theirs in self.maps(student, targets)]
        return sum(losses[1:], losses[0])


def _patch(size: tuple[int, int], scale: float) -> tuple[int, int]:
    height, width = (max(int(side * scale), 1) for side in size)
    return height, width


def _nodes(size: tuple[int, int], scale: float) -> int:
    return math.prod(math.ceil(side / patch) for side, patch in zip(size, _patch(size, scale), strict=True))


def _similarities(nodes: Tensor) -> Tensor:
    """Return a_ij of (N, F, h, w) nodes, (N, h·w, h·w)."""
    nodes = nodes.flatten(2)
    norm = torch.linalg.vector_norm(nodes.detach(), dim=1, keepdim=True)
    unit = torch.where(norm > 0, nodes / (norm + 1e-8), 0)
    return unit.transpose(1, 2) @ unit
