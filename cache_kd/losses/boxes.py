"""In: box logits. Out: boxes xyxy in grid units of each anchor's own level, the anchor at the origin."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_boxes(box_logits: Tensor, reg_max: int) -> Tensor:
    """Return xyxy (…, 4) in grid units, relative to the anchor: overlaps of boxes of one anchor need no more.

    Args:
        box_logits: (…, 4·R), sides l, t, r, b; a side's distance is the mean bin of its softmax, bins 0 to R − 1.
        reg_max: R; 1 means that the values are distances already (they may be negative).
    """
    distances = box_logits
    if reg_max > 1:
        bins = torch.arange(reg_max, device=box_logits.device, dtype=box_logits.dtype)
        distances = box_logits.view(*box_logits.shape[:-1], 4, reg_max).softmax(-1) @ bins
    return torch.cat((-distances[..., :2], distances[..., 2:]), -1)
