"""In: values of all anchors in a row. Out: the map of each level."""

from __future__ import annotations

import torch
from torch import Tensor


def level_maps(values: Tensor, features: tuple[Tensor, ...]) -> list[Tensor]:
    """Return one map (B, C, H, W) a level.

    Args:
        values: (B, A, C), levels in a row and each of them row by row, as heads give them.
        features: the head's inputs, (B, F, H, W) a level; only their sizes are read.
    """
    sizes = [level.shape[2:] for level in features]
    levels = torch.split(values, [height * width for height, width in sizes], 1)
    return [rows.transpose(1, 2).reshape(*rows.shape[::2], *size) for rows, size in zip(levels, sizes, strict=True)]
