"""In: views, a teacher, a codec, a writer. Out: committed units; what is committed already is not done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader

from cache_kd.cache.writer import CacheWriter
from cache_kd.errors import AlarmError, in_own_words
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


@dataclass(frozen=True)
class Unit:
    """The unit of writing, resuming and distributing: one shard of one view."""

    view: View
    shard: int

    def indices(self, shard_size: int, num_images: int) -> range:
        """Return the image indices of this unit."""
        return range(self.shard * shard_size, min((self.shard + 1) * shard_size, num_images))


def open_units(writer: CacheWriter, views: Sequence[View]) -> list[Unit]:
    """Return the units of `views` that are not committed yet, in their fixed order."""
    return [Unit(view, shard) for view in views for shard in writer.units(view) if not writer.done(view, shard)]


def view_batches(
    dataset: ViewDataset, units: Sequence[Unit], *, shard_size: int, batch: int, workers: int
) -> Iterator[tuple[Unit, bool, list[ViewSample]]]:
    """Yield (unit, last batch of the unit, views); a batch never straddles two units."""
    plan: list[tuple[Unit, bool]] = []
    keys: list[list[tuple[View, int]]] = []
    for unit in units:
        indices = unit.indices(shard_size, len(dataset))
        for start in range(0, len(indices), batch):
            keys.append([(unit.view, index) for index in indices[start : start + batch]])
            plan.append((unit, start + batch >= len(indices)))
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # the Protocol names what is used of it; torch wants its own base class
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=list,
    )
    with in_own_words():
        for (unit, last), views in zip(plan, loader, strict=True):
            yield unit, last, views


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
    units: Sequence[Unit],
    *,
    dataset: ViewDataset,
    teacher: TeacherModel,
    codec: TargetCodec,
    writer: CacheWriter,
    batch: int,
    workers: int,
    environment: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Run the teacher over every view of `units`, commit each unit once whole, with the seconds that it took.

    Args:
        progress: Called after each batch with the number of views it held.
    """
    rows: dict[str, list[np.ndarray]] = {}
    watch = Stopwatch(teacher)
    for unit, last, views in view_batches(dataset, units, shard_size=writer.shard_size, batch=batch, workers=workers):
        watch.stage("views")
        first = unit.shard * writer.shard_size + len(rows.get(PIXEL_HASH.name, []))
        for row in encode_views(views, teacher, codec, batch=batch, place=places(dataset, unit.view, first)):
            for name, values in row.items():
                rows.setdefault(name, []).append(values)
        watch.stage("targets")
        writer.sign()
        if last:
            writer.write_unit(unit.view, unit.shard, rows, environment, seconds=watch.taken())
            rows = {}
            watch = Stopwatch(teacher)
        progress(len(views))


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
