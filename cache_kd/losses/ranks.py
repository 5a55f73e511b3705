"""In: what one process of a distributed run has computed. Out: what all of them have; alone, the same unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process, from 0, and how many there are; (0, 1) alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(values: Tensor) -> Tensor:
    """Return the sum over all processes, without gradient; every process must call it at the same point."""
    values = values.detach()
    if rank_and_world()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor's mean over all processes, by one exchange; every process must call it with equal shapes."""
    world = rank_and_world()[1]
    if world == 1 or not tensors:
        return list(tensors)
    means = summed(torch.cat([tensor.flatten() for tensor in tensors])) / world
    parts = torch.split(means, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def of_the_first(number: float, device: torch.device) -> float:
    """Return the first process's number; every process must call it at the same point."""
    if rank_and_world()[1] == 1:
        return number
    held = torch.tensor([number], dtype=torch.float64, device=device)
    dist.broadcast(held, src=0)
    return float(held)


def own_rows(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """Return this process's part of random numbers, one a row of a batch.

    A batch shared by W processes is dealt out in turn, so that its rows, and so their numbers, are those that one
    process with the whole batch has.

    Args:
        draw: returns so many rows; the same ones in every process. rows: of this process's batch.
    """
    rank, world = rank_and_world()
    return draw(rows * world)[rank::world]
