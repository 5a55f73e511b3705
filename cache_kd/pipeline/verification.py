"""In: a cache, on request its data set and its teacher. Out: every fault found: bytes, pixels, targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_kd.cache.verify import VerifyReport, verify_cache
from cache_kd.errors import MismatchError, SettingError
from cache_kd.pipeline.identity import recodings, teacher_differences
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.packed import check_decoder
from cache_kd.pipeline.sizes import megabytes
from cache_kd.pipeline.versions import cpu_threads, other_versions, version_differences
from cache_kd.structures import SampleTargets, TargetBatch, View
from cache_kd.ultralytics_bridge.teacher import Teacher, load_teacher
from cache_kd.views.seeding import pixel_hash

SHOWN = 20
RELATIVE_SLACK = 1e-4
"""Room for rounding of the teacher itself, relative to a level's largest value: batch size and threads differ."""


@dataclass(frozen=True)
class Verification:
    """What `cache-kd verify` found.

    Attributes:
        report: of the bytes. pixel_faults, target_faults: one line each.
        pixels_checked, targets_checked: items looked at. worst: largest error of a target in units of its bound.
    """

    report: VerifyReport
    pixels_checked: int = 0
    pixel_faults: tuple[str, ...] = ()
    targets_checked: int = 0
    target_faults: tuple[str, ...] = ()
    worst: float = 0.0

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
            found.append(f"pixels: {self.pixels_checked} views made again, {len(self.pixel_faults)} differ")
        if self.targets_checked:
            found.append(
                f"targets: {self.targets_checked} views through the teacher, {len(self.target_faults)} out of bounds, "
                f"largest error {self.worst:.2f} of the declared bound"
            )
        return found + [f"  {fault}" for fault in (*self.pixel_faults[:20], *self.target_faults[:20])]


def verify(
    path: Path,
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
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check a cache's bytes; with `pixels` every view's hash; with `teacher` the targets of `sample` items.

    `jobs`, `fraction` and `seed` as in `verify_cache`.

    Raises:
        CacheKDError: There is no complete cache, or data set or teacher are not the ones it was made from.
    """
    if sample < 1:
        raise SettingError(f"--sample {sample}; allowed: 1 or more")
    report = verify_cache(path, jobs=jobs, fraction=fraction, seed=seed, progress=progress)
    checked = 0
    pixel_faults: list[str] = []
    targets_checked, worst = 0, 0.0
    target_faults: list[str] = []
    if report.ok and (pixels or teacher is not None):
        cache = Cache(path, data=data)
        if differing := other_versions(cache.manifest.identity):
            say(f"other versions than at the extraction: {differing}")
        if pixels:
            same_decoder = cache.packing is None or not check_decoder(cache.reader, cache.packing)
            pixel_faults = list(_pixel_faults(cache, progress, compare=same_decoder))
            checked = cache.manifest.num_images * len(cache.views)
        if teacher is not None:
            targets_checked, target_faults, worst = _target_faults(cache, teacher, sample, trust_teacher)
    elif not report.ok:
        say("pixels and targets are not looked at while files are damaged")
    return Verification(report, checked, tuple(pixel_faults), targets_checked, tuple(target_faults), worst)


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


def _target_faults(cache: Cache, path: Path, sample: int, trusted: bool) -> tuple[int, list[str], float]:
    manifest = cache.manifest
    checkpoint = load_teacher(path, trusted=trusted)
    if unlike := teacher_differences(manifest.identity.get("teacher"), checkpoint):
        raise MismatchError(
            f"{path} is not the teacher of {cache.path} ({unlike}); give the one that it was extracted with: "
            f"--teacher {manifest.teacher['file']}"
        )
    environment = manifest.environment
    device = "cuda:0" if environment["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    teacher = Teacher(
        checkpoint,
        imgsz=manifest.imgsz,
        device=device,
        precision=environment["precision"] if device != "cpu" else "fp32",
        store=tuple(manifest.codec["store"]),
        taps=tuple(tap.name for tap in manifest.head.layers),
    )
    items = _spread(cache.views, manifest.num_images, sample)
    batch = int(environment["batch"])
    faults: list[str] = []
    worst = 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(cpu_threads())
    try:
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            live = teacher([cache.dataset.sample(view, index) for view, index in part], batch=batch)
            for (view, index), said in zip(part, live, strict=True):
                for name, error in _errors(cache, view, index, said).items():
                    worst = max(worst, error)
                    if error > 1:
                        faults.append(f"{view.name}, item {index}: {name} is off by {error:.2f} of its bound")
    finally:
        torch.set_num_threads(threads)
    return len(items), faults, worst


def _spread(views: tuple[View, ...], images: int, sample: int) -> list[tuple[View, int]]:
    """Return `sample` items spread evenly over all views and images."""
    total = len(views) * images
    return [
        (views[n // images], n % images) for n in np.linspace(0, total - 1, min(sample, total)).astype(int).tolist()
    ]


def _errors(cache: Cache, view: View, index: int, live: SampleTargets) -> dict[str, float]:
    """Return {target: largest error in units of its declared bound} of one item."""
    names = tuple(column.name for column in cache.codec.columns)
    row = cache.reader.read(view, index, names)
    batch = cache.codec.decode_one(row)
    found: dict[str, float] = {}
    times = 1 + len(recodings(cache.manifest.identity))  # each coding errs by a step, those before by finer ones
    if batch.features is not None:
        tensors = {name: torch.from_numpy(np.array(values))[None] for name, values in row.items()}
        head = cache.manifest.head
        stored = [*batch.features, *batch.layers.values()]
        steps = [*cache.codec.feature_step(tensors), *cache.codec.layer_step(tensors).values()]
        maps = zip((*head.taps, *head.layers), stored, (*live.features, *live.layers), steps, strict=True)
        for tap, read, true, step in maps:
            error = (read[0] - torch.from_numpy(true)).abs()
            bound = times * step.to(error) + RELATIVE_SLACK * float(np.abs(true).max())
            found[f"features {tap.name}"] = float((error / bound).max())
    if batch.sent is not None:
        found.update({name: error / times for name, error in _logit_errors(cache, batch, live).items()})
    return found


def _logit_errors(cache: Cache, batch: TargetBatch, live: SampleTargets) -> Mapping[str, float]:
    assert batch.sent is not None and batch.scores is not None and batch.boxes is not None
    assert live.scores is not None and live.boxes is not None
    sent = batch.sent[0].numpy()
    boxes = live.boxes
    if cache.manifest.head.reg_max > 1:
        sides = boxes.reshape(len(boxes), 4, -1)
        boxes = (sides - sides.max(axis=2, keepdims=True)).reshape(boxes.shape)
    found = {}
    for name, stored, true in (
        ("scores", batch.scores[0].numpy(), live.scores),
        ("boxes", batch.boxes[0].numpy(), boxes),
    ):
        if not sent.any():
            continue
        half_precision = np.abs(true[sent]) * 2.0**-10 + 1e-4
        step = cache.codec.logit_step
        bound = half_precision if step is None or (name == "boxes" and cache.manifest.head.reg_max == 1) else step / 2
        slack = RELATIVE_SLACK * float(np.abs(true).max())
        found[name] = float((np.abs(stored[sent] - true[sent]) / (bound + slack)).max())
    return found
