"""Rows of all anchors become the maps that they were read from."""

from __future__ import annotations

import torch

from cache_kd.losses.level_maps import level_maps


def test_levels_are_split_and_folded_row_by_row() -> None:
    maps = [torch.randn(2, 3, h, w) for h, w in ((5, 7), (3, 4), (1, 2))]
    rows = torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)
    features = tuple(torch.zeros(2, 9, *level.shape[2:]) for level in maps)
    found = level_maps(rows, features)
    assert len(found) == 3
    assert all(torch.equal(ours, level) for ours, level in zip(found, maps, strict=True))
