"""In: bytes of a batch, workers, shared memory. Out: how many batches workers make ahead, what memory that takes."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from cache_kd.cache.reader import MAX_BLOCK_BYTES
from cache_kd.errors import SettingError

QUEUE_BYTES = 1 << 30
"""What batches made ahead may take together, as long as every worker has `LEAST` of them."""

LEAST, MOST = 2, 4
"""Fewest and most batches that a worker makes ahead; four is Ultralytics' own number."""

SHARED_MEMORY = Path("/dev/shm")
_MIB = 1 << 20


@dataclass(frozen=True)
class Prefetch:
    """Batches between workers and trainer.

    A worker makes at most `ahead` of them before the trainer takes one; the trainer holds one that it uses and one that
    it is being handed. Their tensors lie in shared memory, but for the labels, a few kilobytes.

    Attributes:
        workers: processes; 0 makes batches in the trainer's. ahead: batches of a worker. batch_bytes: of pixels and
            targets.
    """

    workers: int
    ahead: int
    batch_bytes: int

    @property
    def batches(self) -> int:
        """Most batches that there are at any time."""
        return self.workers * self.ahead + 2

    @property
    def queue_bytes(self) -> int:
        """Most bytes of all batches, in shared memory where there are workers."""
        return self.batches * self.batch_bytes

    def total_bytes(self, decoded_bytes: int) -> int:
        """Return the most that the stream takes: batches, and what each process that makes them keeps.

        Args:
            decoded_bytes: of decoded source images that a process keeps; 0 for packed views, which have none.
        """
        return self.queue_bytes + max(self.workers, 1) * (MAX_BLOCK_BYTES + decoded_bytes)


def choose_prefetch(batch_bytes: int, workers: int, free: int | None) -> Prefetch:
    """Return how far workers run ahead: as far as `QUEUE_BYTES` and the free shared memory allow, in `LEAST` to `MOST`.

    Args:
        free: bytes of shared memory; None where its size is unknown.

    Raises:
        SettingError: Even the least does not fit, on which a worker would die of a bus error in mid-training.
    """
    if not workers:
        return Prefetch(0, 0, batch_bytes)
    limit = QUEUE_BYTES if free is None else min(QUEUE_BYTES, free)
    fitting = (limit // max(batch_bytes, 1) - 2) // workers
    chosen = Prefetch(workers, min(max(fitting, LEAST), MOST), batch_bytes)
    if free is not None and chosen.queue_bytes > free:
        asked = math.ceil(chosen.queue_bytes / (1 << 30))
        raise SettingError(
            f"workers={workers} need {chosen.queue_bytes / _MIB:.0f} MiB of shared memory ({chosen.batches} batches of "
            f"{batch_bytes / _MIB:.1f} MiB), {SHARED_MEMORY} has {free / _MIB:.0f} MiB free; train with workers=0, or "
            f"fewer workers, or a smaller batch, or start the container with docker run --shm-size={asked}g"
        )
    return chosen


def free_shared_memory() -> int | None:
    """Return the free bytes of the memory that processes share; None on systems that give it no place of its own."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
