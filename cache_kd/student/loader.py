"""In: a schedule and a data set. Out: batches that say which epoch and view they are, never those of another epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from cache_kd.errors import AlarmError, MismatchError, in_own_words
from cache_kd.structures import View
from cache_kd.student.order import ShuffleWindow, epoch_order
from cache_kd.student.schedule import ViewSchedule


class ViewSampler(Sampler[tuple[int, View, int]]):
    """Yields (epoch, view, index); the order is a function of (seed, epoch), `set_epoch` is the only state.

    With `world` ranks each takes every `world`-th entry of one common permutation, padded from its start so that all
    ranks have equally many.
    """

    def __init__(
        self,
        size: int,
        schedule: ViewSchedule,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        window: ShuffleWindow | None = None,
    ) -> None:
        self.size, self.schedule, self.seed, self.window = size, schedule, seed, window
        self.rank, self.world, self.epoch = rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration serves."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return -(-self.size // self.world)

    def __iter__(self) -> Iterator[tuple[int, View, int]]:
        epoch, view = self.epoch, self.schedule.view(self.epoch)
        order = epoch_order(self.size, seed=self.seed, epoch=epoch, window=self.window)
        order += order[: len(self) * self.world - self.size]
        for index in order[self.rank :: self.world]:
            yield epoch, view, index


class ViewLoader(DataLoader[Any]):
    """A DataLoader with lasting workers that restarts its sampler at every epoch and refuses a stale batch.

    Ultralytics' own loader keeps one endless iterator, whose prefetch crosses the epoch's end: with two workers the
    view lagged by an epoch when this was measured.
    """

    proven = (0, 0)
    """Items whose pixels were compared with the teacher's, and all items, that were served so far."""

    def __iter__(self) -> Any:
        # A generator, because the trainer calls iter() twice an epoch and only the second may start the workers' pass.
        expected = self.sampler.epoch  # type: ignore[attr-defined]  # DataLoader declares the sampler's base class
        with in_own_words():
            for batch in super().__iter__():
                held = batch["kd_epoch"]
                if held != expected:
                    raise AlarmError(f"stale batch: it holds epoch {held}, the trainer is in epoch {expected}")
                if fault := batch.pop("kd_fault", None):
                    raise MismatchError(fault)
                checked, served = batch.pop("kd_checked", (0, 0))
                self.proven = (self.proven[0] + checked, self.proven[1] + served)
                yield batch

    def reset(self) -> None:
        """Drop the workers; the next iteration starts new ones."""
        self.close()

    def close(self) -> None:
        """Shut the workers down (the trainer calls this after an out-of-memory retry and at its end)."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
