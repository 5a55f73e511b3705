"""In: a cache, on request its data set and its teacher. Out: every fault found: bytes, pixels, targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache_kd.cache.store import Place
from cache_kd.cache.verify import VerifyReport, verify_cache
from cache_kd.errors import SettingError
from cache_kd.pipeline.live_teacher import live_teacher
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.packed import check_decoder, decoder_change
from cache_kd.pipeline.sizes import megabytes
from cache_kd.pipeline.target_errors import fidelities, named_targets, pixel_room, target_errors
from cache_kd.pipeline.versions import other_versions, version_differences
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.teacher import Teacher
from cache_kd.views.seeding import pixel_hash

SHOWN = 20


@dataclass(frozen=True)
class Verification:
    """What `cache-kd verify` found.

    Attributes:
        report: of the bytes. pixel_faults, target_faults: one line each.
        pixels_checked, targets_checked: items looked at. worst: largest error of a target in units of its bound.
        packed: the views are in the cache. decoder_difference: levels by which this machine decodes them otherwise.
        room: what was allowed for those levels beyond the bound, at most, as a share of a target's largest value.
    """

    report: VerifyReport
    pixels_checked: int = 0
    pixel_faults: tuple[str, ...] = ()
    targets_checked: int = 0
    target_faults: tuple[str, ...] = ()
    worst: float = 0.0
    packed: bool = False
    decoder_difference: int = 0
    room: float = 0.0

    @property
    def ok(self) -> bool:
        return self.report.ok and not self.pixel_faults and not self.target_faults

    def to_json(self) -> dict[str, Any]:
        return {
            **self.report.to_json(),
            "ok": self.ok,
            "pixels_checked": self.pixels_checked,
            "pixel_faults": list(self.pixel_faults),
            "targets_checked": self.targets_checked,
            "target_faults": list(self.target_faults),
            "worst_error_in_bounds": self.worst,
            "packed": self.packed,
            "decoder_difference": self.decoder_difference,
            "room_for_decoder": self.room,
        }

    def lines(self) -> list[str]:
        """Return the findings as lines for people."""
        report = self.report
        state = "everything is whole" if report.ok else f"{len(report.faults)} faults"
        found = [f"{report.path}: {report.files} files, {megabytes(report.bytes)}, {state}"]
        if report.left_out:
            found.append(f"{report.left_out} more files were only measured, not read; all of them: without --fraction")
        found += [f"  {fault}" for fault in report.faults[:SHOWN]]
        if len(report.faults) > SHOWN:
            found.append(f"  and {len(report.faults) - SHOWN} more; all of them: --json")
        if not report.ok:
            found.append(f"to put back what is damaged: cache-kd verify {report.path} --repair --teacher best.pt")
        found += [f"  note: {note}" for note in report.notes]
        if self.pixels_checked:
            found.append(f"pixels: {self.pixels_checked} {self._pixels_in_words()}")
        if self.targets_checked:
            found.append(
                f"targets: {self.targets_checked} views through the teacher, {len(self.target_faults)} out of bounds, "
                f"largest error {self.worst:.2f} of the declared bound{self._room_in_words()}"
            )
        return found + [f"  {fault}" for fault in (*self.pixel_faults[:20], *self.target_faults[:20])]

    def _pixels_in_words(self) -> str:
        if self.decoder_difference:
            return (
                f"packed views decoded, their hashes not compared: this machine decodes them up to "
                f"{self.decoder_difference} of 255 levels off"
            )
        done = "packed views decoded" if self.packed else "views made again"
        return f"{done}, {len(self.pixel_faults)} differ"

    def _room_in_words(self) -> str:
        if not self.decoder_difference:
            return ""
        return (
            f" and of what pixels that are as far off may change (tried with the teacher: at most "
            f"{100 * self.room:.2g} % of a target's largest value)"
        )


def verify(
    path: Place,
    *,
    pixels: bool = False,
    teacher: Path | None = None,
    data: Path | None = None,
    sample: int = 32,
    trust_teacher: bool = False,
    jobs: int = 1,
    fraction: float = 1.0,
    seed: int = 0,
    say: Callable[[str], None],
    reading: Callable[[int, int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check a cache's bytes; with `pixels` every view's hash; with `teacher` the targets of `sample` items.

    `jobs`, `fraction` and `seed` as in `verify_cache`; `reading` is told bytes, `progress` views that were made again.

    Raises:
        CacheKDError: There is no complete cache, or data set or teacher are not the ones it was made from.
    """
    if sample < 1:
        raise SettingError(f"--sample {sample}; allowed: 1 or more")
    report = verify_cache(path, jobs=jobs, fraction=fraction, seed=seed, progress=reading)
    checked = 0
    pixel_faults: list[str] = []
    targets = _Targets()
    packed, difference = False, 0
    if report.ok and (pixels or teacher is not None):
        cache = Cache(path, data=data)
        if differing := other_versions(cache.manifest.identity):
            say(f"other versions than at the extraction: {differing}")
        if cache.packing is not None:
            packed, difference = True, check_decoder(cache.reader, cache.packing)
        if pixels:
            pixel_faults = list(_pixel_faults(cache, progress, compare=not difference))
            checked = cache.manifest.num_images * len(cache.views)
        if teacher is not None:
            targets = _check_targets(cache, teacher, sample, trusted=trust_teacher, levels=difference)
    elif not report.ok:
        say("pixels and targets are not looked at while files are damaged")
    return Verification(
        report,
        checked,
        tuple(pixel_faults),
        targets.checked,
        tuple(targets.faults),
        targets.worst,
        packed,
        difference,
        targets.room,
    )


@dataclass
class _Targets:
    """What comparing targets found."""

    checked: int = 0
    faults: list[str] = field(default_factory=list)
    worst: float = 0.0
    room: float = 0.0


def _pixel_faults(cache: Cache, progress: Callable[[int, int], None] | None, *, compare: bool) -> Iterator[str]:
    """Yield a line for each view with other pixels than the teacher saw; without `compare` all are only made."""
    context = version_differences(cache.manifest.identity)
    total = cache.manifest.num_images * len(cache.views)
    done = 0
    for view in cache.views:
        for index in range(cache.manifest.num_images):
            stored = cache.reader.read(view, index, ("pixel_hash",))["pixel_hash"].tobytes()
            found = pixel_hash(cache.dataset.sample(view, index).pixels)
            if stored != found and compare:
                name = cache.images[index].path
                yield f"{view.name}, item {index} ({name}): pixels {found.hex()}, stored {stored.hex()}; {context}"
            done += 1
            if progress:
                progress(done, total)


def _check_targets(cache: Cache, path: Path, sample: int, *, trusted: bool, levels: int) -> _Targets:
    """Compare a sample of the targets with the teacher's; `levels` is what the pixels may be off by."""
    manifest = cache.manifest
    items = _spread(cache.views, manifest.num_images, sample)
    batch = int(manifest.environment["batch"])
    found = _Targets(checked=len(items))
    change = decoder_change(cache.reader, cache.packing) if cache.packing is not None and levels else None
    with live_teacher(cache, path, trusted=trusted) as teacher:
        for start in range(0, len(items), batch):
            _compare_batch(cache, teacher, items[start : start + batch], batch, change, found)
    return found


def _compare_batch(
    cache: Cache,
    teacher: Teacher,
    items: list[tuple[View, int]],
    batch: int,
    change: np.ndarray | None,
    found: _Targets,
) -> None:
    codec = cache.codec
    coded, columns = fidelities(cache.manifest.identity, codec), tuple(column.name for column in codec.columns)
    samples = [cache.dataset.sample(view, index) for view, index in items]
    rooms = [dict[str, float]()] * len(items)
    if change is not None:
        rooms = pixel_room(codec, teacher, samples, change, batch=batch)
    for (view, index), said, room in zip(items, teacher(samples, batch=batch), rooms, strict=True):
        errors = target_errors(codec, cache.reader.read(view, index, columns), said, coded=coded, room=room)
        largest = {name: float(np.abs(values).max()) for name, values in named_targets(codec, said).items()}
        found.room = max(found.room, *(share / (largest[name] or 1.0) for name, share in room.items()), 0.0)
        for name, error in errors.items():
            found.worst = max(found.worst, error)
            if error > 1:
                found.faults.append(f"{view.name}, item {index}: {name} is off by {error:.2f} of its bound")


def _spread(views: tuple[View, ...], images: int, sample: int) -> list[tuple[View, int]]:
    """Return `sample` items spread evenly over all views and images."""
    total = len(views) * images
    return [
        (views[n // images], n % images) for n in np.linspace(0, total - 1, min(sample, total)).astype(int).tolist()
    ]
