"""In: the labelled boxes of a batch, all images in a row. Out: the same by image, as lists or padded to one length."""

from __future__ import annotations

import torch
from torch import Tensor

from cache_kd.structures import Labels


def boxes_by_image(labels: Labels, images: int) -> list[Tensor]:
    """Return one tensor (k, 4) xyxy in pixels an image; k may be 0."""
    counts = torch.bincount(labels.image, minlength=images).tolist()
    return list(torch.split(labels.boxes, counts))


def padded_boxes(boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return boxes (N, K, 4), zeros where an image has fewer than the most of K, and which are real (N, K) bool."""
    padded = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    counts = torch.tensor([len(rows) for rows in boxes], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < counts[:, None]


def cell_centres(height: int, width: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x (W,) and y (H,) of the centres of a map's cells, in cells."""
    x = torch.arange(width, device=device, dtype=dtype) + 0.5
    y = torch.arange(height, device=device, dtype=dtype) + 0.5
    return x, y
