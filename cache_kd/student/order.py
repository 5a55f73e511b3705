"""In: a seed, an epoch, the number of images. Out: the order in which the epoch shows them, over all or in windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ShuffleWindow:
    """A shuffle that needs few shards at a time: shards in random order, the images of so many of them mixed.

    Attributes:
        samples: images of a shard. shards: shards whose images are mixed.
    """

    samples: int
    shards: int


def epoch_order(size: int, *, seed: int, epoch: int, window: ShuffleWindow | None = None) -> list[int]:
    """Return the indices of the images in the order of an epoch: a permutation, a function of the arguments alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if window is None:
        return list(torch.randperm(size, generator=generator).tolist())
    order: list[int] = []
    for shards in _windows(size, window, generator):
        held = [index for shard in shards for index in _samples(shard, size, window)]
        order += [held[place] for place in torch.randperm(len(held), generator=generator).tolist()]
    return order


def shard_groups(size: int, samples: int, *, seed: int, epoch: int, window: ShuffleWindow | None) -> list[list[int]]:
    """Return the shards of an epoch by when they are needed: groups one after the other, each in the order of need.

    Without a window every shard is needed from the first batches to the last, so there is one group.
    """
    order = epoch_order(size, seed=seed, epoch=epoch, window=window)
    shards = list(dict.fromkeys(index // samples for index in order))
    step = len(shards) if window is None else window.shards
    return [shards[start : start + step] for start in range(0, len(shards), step)]


def _windows(size: int, window: ShuffleWindow, generator: torch.Generator) -> list[list[int]]:
    count = -(-size // window.samples)
    shards = torch.randperm(count, generator=generator).tolist()
    return [shards[start : start + window.shards] for start in range(0, count, window.shards)]


def _samples(shard: int, size: int, window: ShuffleWindow) -> range:
    return range(shard * window.samples, min((shard + 1) * window.samples, size))
