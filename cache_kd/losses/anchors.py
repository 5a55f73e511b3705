"""In: the teacher's class logits of a batch. Out: its confidence at each anchor, and the anchors whose boxes count."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this the teacher sees no object, and its box is noise.
MIN_BOX_SCORE = 0.05


def confidence(scores: Tensor) -> Tensor:
    """Return max over classes of the sigmoid probability, (B, A), of logits (B, A, C); without gradient."""
    return scores.detach().amax(-1).sigmoid()


def total_confidence(sure: Tensor) -> Tensor:
    """Return Z, the sum of (B, A) confidences, at least 1: what stands for the number of positives without labels."""
    return sure.sum().clamp(min=1.0)


def box_anchors(sure: Tensor, sent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return image and anchor indices, (n,) each, of boxes worth learning.

    Args:
        sure: (B, A) confidences; the teacher must see an object.
        sent: (B, A) bool, the box was sent; None means that all were.
    """
    chosen = sure > MIN_BOX_SCORE
    images, anchors = torch.nonzero(chosen if sent is None else chosen & sent, as_tuple=True)
    return images, anchors


def rows_at(values: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
    """Return the rows (n, K) of values (B, A, K) at image and anchor indices that occur once each.

    What `values[chosen]` is, in half its time: without a copy of what lies anchors last, as a head leaves it, and row
    by row of what lies anchors first, as targets do.
    """
    images, anchors = chosen
    if values.stride(1) < values.stride(2):
        return values.transpose(1, 2)[images, :, anchors]
    return values.flatten(0, 1).index_select(0, images * values.shape[1] + anchors)
