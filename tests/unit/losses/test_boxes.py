"""Box logits become boxes, of bins and of plain distances."""

from __future__ import annotations

import torch

from cache_kd.losses.boxes import decode_boxes


def test_boxes_are_decoded_from_bins_and_from_distances() -> None:
    distances = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    assert decode_boxes(distances, 1).tolist() == [[-1.0, -2.0, 3.0, 0.5]]
    # All mass on bins 1, 2, 3; the last side half on bin 0 and half on bin 1.
    logits = torch.full((1, 4, 4), -100.0)
    for side, bins in enumerate(((1,), (2,), (3,), (0, 1))):
        logits[0, side, list(bins)] = 0.0
    torch.testing.assert_close(decode_boxes(logits.flatten(1), 4), torch.tensor([[-1.0, -2.0, 3.0, 0.5]]))
