"""In: views, a teacher, a codec, a writer. Out: committed units; what is committed already is not done again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader

from cache_kd.cache.writer import CacheWriter
from cache_kd.errors import AlarmError, CacheKDError, InputDataError, in_own_words
from cache_kd.structures import PIXEL_HASH, HeadSpec, SampleTargets, TargetCodec, View, ViewDataset, ViewSample
from cache_kd.views.seeding import pixel_hash


class TeacherModel(Protocol):
    """A teacher as the loop sees it: raw targets of a batch of views."""

    @property
    def head(self) -> HeadSpec: ...

    @property
    def forward_seconds(self) -> float:
        """Seconds spent in forward passes so far, all of them together."""
        ...

    def __call__(self, views: list[ViewSample], *, batch: int) -> list[SampleTargets]: ...


UNIT_FAULTS = (AlarmError, InputDataError)
"""What a single unit can be to blame for; any other error would end the next unit too."""


@dataclass(frozen=True)
class Unit:
    """The unit of writing, resuming and distributing: one shard of one view."""

    view: View
    shard: int

    def __str__(self) -> str:
        return f"{self.view.name} shard {self.shard}"

    def indices(self, shard_size: int, num_images: int) -> range:
        """Return the image indices of this unit."""
        return range(self.shard * shard_size, min((self.shard + 1) * shard_size, num_images))


def all_units(writer: CacheWriter, views: Sequence[View]) -> list[Unit]:
    """Return the units of `views` in their fixed order, the same on every machine."""
    return [Unit(view, shard) for view in views for shard in writer.units(view)]


def open_units(writer: CacheWriter, units: Sequence[Unit]) -> list[Unit]:
    """Return those of `units` that are not committed yet, in their order."""
    return [Unit(*unit) for unit in writer.unfinished([(unit.view, unit.shard) for unit in units])]


@dataclass(frozen=True)
class ViewBatch:
    """Views of one unit that go through the teacher together, or why they could not be made.

    Attributes:
        turn: counts the units as they were taken; a unit may be taken again. last: of its unit.
    """

    turn: int
    unit: Unit
    last: bool
    views: list[ViewSample] | InputDataError


class ViewBatches:
    """Yields the batches of `units`, of which a loader makes the views; a batch never straddles two units.

    A unit is taken when the loader has room for its first batch, with `workers` some batches ahead.
    """

    def __init__(
        self, dataset: ViewDataset, units: Iterable[Unit], *, shard_size: int, batch: int, workers: int
    ) -> None:
        self._dataset, self._units = dataset, units
        self._size, self._batch, self._workers = shard_size, batch, workers
        self._asked: deque[tuple[int, Unit, bool]] = deque()
        self._dropped: set[int] = set()

    def drop(self, turn: int) -> None:
        """Yield no more of the unit that was taken as number `turn`."""
        self._dropped.add(turn)

    def __iter__(self) -> Iterator[ViewBatch]:
        loader = iter(
            DataLoader(
                self._dataset,  # type: ignore[arg-type]  # torch wants its own base class of what the Protocol names
                batch_sampler=self._keys(),
                num_workers=self._workers,
                collate_fn=list,
            )
        )
        while True:
            found: list[ViewSample] | InputDataError
            try:
                with in_own_words():
                    found = next(loader)
            except StopIteration:
                return
            except InputDataError as error:
                found = error
            turn, unit, last = self._asked.popleft()
            if turn not in self._dropped:
                yield ViewBatch(turn, unit, last, found)

    def _keys(self) -> Iterator[list[tuple[View, int]]]:
        for turn, unit in enumerate(self._units):
            indices = unit.indices(self._size, len(self._dataset))
            for start in range(0, len(indices), self._batch):
                if turn in self._dropped:
                    break
                self._asked.append((turn, unit, start + self._batch >= len(indices)))
                yield [(unit.view, index) for index in indices[start : start + self._batch]]


def encode_views(
    views: list[ViewSample], teacher: TeacherModel, codec: TargetCodec, *, batch: int, place: Callable[[int], str]
) -> list[dict[str, np.ndarray]]:
    """Return one row of columns a view: encoded targets, what packs the view, the hash of what the teacher saw.

    Args:
        place: Says of a position in `views` which view and image it is.

    Raises:
        AlarmError: The teacher said something that cannot be stored, and of what.
    """
    rows = []
    for position, (view, targets) in enumerate(zip(views, teacher(views, batch=batch), strict=True)):
        try:
            row = codec.encode(targets)
        except AlarmError as error:
            raise AlarmError(f"{place(position)}: {error}; what is committed stays") from error
        row.update(view.packed)
        row[PIXEL_HASH.name] = np.frombuffer(pixel_hash(view.pixels), dtype=np.uint8)
        rows.append(row)
    return rows


def places(dataset: ViewDataset, view: View, first: int) -> Callable[[int], str]:
    """Return what `encode_views` needs for views of images `first`, `first` + 1, …."""
    return lambda position: f"view {view.name}, item {first + position} ({dataset.image_name(first + position)})"


def extract_units(
    units: Iterable[Unit],
    *,
    dataset: ViewDataset,
    teacher: TeacherModel,
    codec: TargetCodec,
    writer: CacheWriter,
    batch: int,
    workers: int,
    environment: dict[str, Any],
    progress: Callable[[Unit, int], None] = lambda unit, views: None,
    done: Callable[[Unit], None] = lambda unit: None,
    failed: Callable[[Unit, CacheKDError], None] | None = None,
) -> None:
    """Run the teacher over every view of `units`, commit each unit once whole, with the seconds that it took.

    Args:
        units: Taken one by one, with `workers` some ahead of the work.
        progress: Called after each batch with the number of views it held. done: Called when a unit is committed.
        failed: Takes a unit and what it is to blame for, of `UNIT_FAULTS`; the others go on. None: that is raised.
    """
    rows: dict[str, list[np.ndarray]] = {}
    watch = Stopwatch(teacher)
    batches = ViewBatches(dataset, units, shard_size=writer.shard_size, batch=batch, workers=workers)
    for made in batches:
        unit, views = made.unit, made.views
        watch.stage("views")
        first = unit.shard * writer.shard_size + len(rows.get(PIXEL_HASH.name, []))
        try:
            if isinstance(views, InputDataError):
                raise views
            encoded = encode_views(views, teacher, codec, batch=batch, place=places(dataset, unit.view, first))
        except UNIT_FAULTS as error:
            if failed is None:
                raise
            batches.drop(made.turn)
            rows, watch = {}, Stopwatch(teacher)
            failed(unit, error)
            continue
        for row in encoded:
            for name, values in row.items():
                rows.setdefault(name, []).append(values)
        watch.stage("targets")
        writer.sign()
        if made.last:
            writer.write_unit(unit.view, unit.shard, rows, environment, seconds=watch.taken())
            rows, watch = {}, Stopwatch(teacher)
        progress(unit, len(views))
        if made.last:
            done(unit)


class Stopwatch:
    """Seconds of the stages of a unit: "views" (waiting for them), "targets" (teacher and codec), of it "forward"."""

    def __init__(self, teacher: TeacherModel) -> None:
        self._teacher, self._before = teacher, teacher.forward_seconds
        self._seconds = {"views": 0.0, "targets": 0.0}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """Say that the stage `name` ends now."""
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self._last = now

    def taken(self) -> dict[str, float]:
        """Return the seconds so far."""
        seconds = {**self._seconds, "forward": self._teacher.forward_seconds - self._before}
        return {name: round(value, 6) for name, value in seconds.items()}
