"""In: a function. Out: what it returns in each of two processes of one gloo group, and alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

WORLD = 2
LIMIT = timedelta(seconds=60)


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Return what `work(rank)` returns in two forked processes; raises what either raises."""
    # Forked: starting Python and torch again would take seconds.
    processes.start_processes(_part, (work, folder), nprocs=WORLD, start_method="fork")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _part(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)  # the parent's threads did not survive the fork
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", timeout=LIMIT, rank=rank, world_size=WORLD)
    try:
        torch.save(work(rank), folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()
