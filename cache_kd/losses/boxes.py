"""In: box logits and grid sizes. Out: boxes xyxy in grid units of each anchor's own level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def anchor_centers(
    grids: Sequence[tuple[int, int]], *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return (A, 2) x, y of cell centres in grid units; levels in order, rows of (H, W) cells one after the other."""
    levels = []
    for height, width in grids:
        y, x = torch.meshgrid(
            torch.arange(height, device=device, dtype=dtype) + 0.5,
            torch.arange(width, device=device, dtype=dtype) + 0.5,
            indexing="ij",
        )
        levels.append(torch.stack((x, y), -1).view(-1, 2))
    return torch.cat(levels)


def decode_boxes(box_logits: Tensor, reg_max: int, centers: Tensor | None = None) -> Tensor:
    """Return xyxy (…, 4) in grid units.

    Args:
        box_logits: (…, 4·R), sides l, t, r, b; a side's distance is the mean bin of its softmax, bins 0 to R − 1.
        reg_max: R; 1 means that the values are distances already (they may be negative).
        centers: (…, 2) x, y of the anchors; None puts every anchor at the origin.
    """
    distances = box_logits
    if reg_max > 1:
        bins = torch.arange(reg_max, device=box_logits.device, dtype=box_logits.dtype)
        distances = box_logits.view(*box_logits.shape[:-1], 4, reg_max).softmax(-1) @ bins
    low, high = -distances[..., :2], distances[..., 2:]
    return torch.cat((low, high) if centers is None else (low + centers, high + centers), -1)
