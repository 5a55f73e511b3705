"""In: feature maps. Out: how differently cells of teacher and student resemble their neighbours (LOCAL)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.losses.maps import MapLoss
from cache_kd.losses.numeric import comparable_maps
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

SMALLEST = 1e-8
"""Norm up to which a cell has no direction: its similarities are 0, and it gets no gradient."""


def local_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the local similarity loss of one level.

    mean_{n,(p,q)} (a_pq(T) − a_pq(S))² over the pairs of a cell p and one of its up to 8 neighbours q inside the map,
    a_pq = cos(F_p, F_q). Each pair is taken once: a_pq = a_qp, so the mean over both orders is the same number. Mean
    over images and pairs; 0 when each cell resembles its neighbours alike; 0 for a map of one cell.

    Xie et al., "Improving Fast Segmentation with Teacher-student Learning", BMVC 2018 (arXiv 1810.08476). No code of
    the authors was found: this follows later papers that compare themselves with it and call it a similarity map of
    each pixel with its 8 neighbours. Cosine and mean are the choice made here.

    Args:
        student: (N, F, H, W).
        teacher: (N, F', H, W), never receives gradient; F' may differ from F.
    """
    student, teacher = comparable_maps(student, teacher)
    ours, theirs = _similarities(student), _similarities(teacher)
    return F.mse_loss(ours, theirs) if ours.numel() else ours.sum()


class LOCAL(MapLoss):
    """`local_loss` summed over the pairs of maps; channels may differ, so nothing is trained beside the student."""

    name = "local"
    title = "how much each cell of the neck resembles its eight neighbours"
    paper = "Improving Fast Segmentation with Teacher-student Learning, BMVC 2018"
    default_weight = 2.5
    cost = "four products of every map with itself, shifted by one cell"

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = ()) -> None:
        super().__init__(teacher, student, layers=layers)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        losses = [local_loss(ours, theirs) for ours, theirs in self.maps(student, targets)]
        return sum(losses[1:], losses[0])


def _similarities(maps: Tensor) -> Tensor:
    """Return the cosine of every pair of neighbours in (N, F, H, W) maps, (N, pairs)."""
    norm = torch.linalg.vector_norm(maps, dim=1, keepdim=True)
    unit = torch.where(norm > SMALLEST, maps / norm.clamp_min(SMALLEST), 0)
    neighbours = (
        (unit[..., :, :-1], unit[..., :, 1:]),  # right
        (unit[..., :-1, :], unit[..., 1:, :]),  # below
        (unit[..., :-1, :-1], unit[..., 1:, 1:]),  # below right
        (unit[..., :-1, 1:], unit[..., 1:, :-1]),  # below left
    )
    return torch.cat([(cell * other).sum(1).flatten(1) for cell, other in neighbours], 1)
