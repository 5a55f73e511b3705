"""Boxes drawn as class maps, against loops over cells and boxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cache_kd.losses import rasters
from cache_kd.losses.rasters import label_map


def reference(boxes: list[Tensor], classes: list[Tensor], size: tuple[int, int], stride: int, fill: int) -> Tensor:
    result = torch.full((len(boxes), *size), fill)
    for n, rows in enumerate(boxes):
        for i in range(size[0]):
            for j in range(size[1]):
                y, x = (i + 0.5) * stride, (j + 0.5) * stride
                least = float("inf")
                for (x0, y0, x1, y1), cls in zip(rows.tolist(), classes[n].tolist(), strict=True):
                    if x0 <= x < x1 and y0 <= y < y1 and (x1 - x0) * (y1 - y0) < least:
                        least = (x1 - x0) * (y1 - y0)
                        result[n, i, j] = cls
    return result


def draw(counts: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    boxes = []
    for count in counts:
        low = torch.rand(count, 2, generator=generator) * torch.tensor([70.0, 40.0]) - 10
        boxes.append(torch.cat((low, low + torch.rand(count, 2, generator=generator) * 40), 1))
    return boxes, [torch.randint(5, (count,), generator=generator) for count in counts]


@pytest.mark.parametrize("chunk", [rasters.CHUNK, 2 * 3 * 35, 1])
@pytest.mark.parametrize("counts", [(7, 0, 20), (1, 9, 9), (0, 0, 0)])
def test_equals_loops_whatever_is_held_at_once(
    counts: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rasters, "CHUNK", chunk)
    boxes, classes = draw(counts)
    found = label_map(boxes, classes, size=(5, 7), stride=8)
    assert found.dtype == torch.int64
    assert torch.equal(found, reference(boxes, classes, (5, 7), 8, -1))


def test_by_hand() -> None:
    # Centres at 4, 12, 20 and 28: a low edge on a centre holds it, a high edge does not.
    wide, small = [4.0, 0.0, 28.0, 8.0], [12.0, 2.0, 20.0, 6.0]
    boxes = [torch.tensor([small, wide])]
    assert label_map(boxes, [torch.tensor([3, 0])], size=(1, 4), stride=8).tolist() == [[[0, 3, 0, -1]]]
    assert label_map([boxes[0].flip(0)], [torch.tensor([0, 3])], size=(1, 4), stride=8).tolist() == [[[0, 3, 0, -1]]]
    assert label_map(boxes, [torch.tensor([3, 0])], size=(1, 4), stride=8, ignore_index=9).tolist() == [[[0, 3, 0, 9]]]


def test_of_equal_boxes_the_first_counts_and_one_between_centres_marks_nothing() -> None:
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0], [5.0, 0.0, 11.0, 8.0], [20.0, 4.0, 20.0, 4.0]])
    assert label_map([boxes], [torch.tensor([2, 1, 0, 4])], size=(1, 3), stride=8).tolist() == [[[2, -1, -1]]]
