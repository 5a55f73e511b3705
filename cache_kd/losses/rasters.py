"""In: labelled boxes in pixels. Out: a map of class indices, one a cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cache_kd.losses.labels import cell_centres, padded_boxes

CHUNK = 2**24
"""Pairs of cells and boxes that are held at once."""


def label_map(
    boxes: Sequence[Tensor],
    classes: Sequence[Tensor],
    *,
    size: tuple[int, int],
    stride: int,
    ignore_index: int = -1,
) -> Tensor:
    """Return (N, H, W) int64: the class of the smallest box that holds a cell's centre, `ignore_index` where none does.

    A box holds its left and upper edge, not the right and lower one; of boxes of equal area the first counts. A box
    between the centres marks no cell. Held at once, beside the result: about one byte a pair of cell and box for
    `CHUNK` pairs, or for one box an image if that is more.

    Args:
        boxes: of each image (k, 4) xyxy in pixels, k may be 0. classes: of each image (k,).
        size: H and W of the map. stride: pixels a cell.
        ignore_index: the value of background cells; a class index of its own makes background a class.
    """
    corners, real = padded_boxes(list(boxes))
    kinds = torch.nn.utils.rnn.pad_sequence(list(classes), batch_first=True).long()
    images, most = real.shape
    result = torch.full((images, *size), ignore_index, dtype=torch.int64, device=corners.device)
    area = (corners[..., 2:] - corners[..., :2]).prod(-1).masked_fill(~real, torch.inf)
    order = area.argsort(dim=1, stable=True)
    # A missing box has no width, so it holds nothing.
    corners, kinds = corners.gather(1, order[..., None].expand(-1, -1, 4)) / stride, kinds.gather(1, order)
    x, y = cell_centres(*size, device=corners.device, dtype=corners.dtype)
    left, top, right, bottom = corners.unsqueeze(2).unbind(-1)
    across, down = (left <= x) & (x < right), (top <= y) & (y < bottom)  # (N, K, W), (N, K, H)
    step = max(CHUNK // max(images * size[0] * size[1], 1), 1)
    for start in reversed(range(0, most, step)):  # smaller boxes later, on top
        part = slice(start, start + step)
        inside = down[:, part, :, None] & across[:, part, None, :]
        first = inside.to(torch.uint8).argmax(1)
        found = kinds[:, part].gather(1, first.flatten(1)).view_as(result)
        result = torch.where(inside.any(1), found, result)
    return result
