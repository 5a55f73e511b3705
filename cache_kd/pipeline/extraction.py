"""In: a teacher's checkpoint and what the user overrides. Out: a complete cache, topped up if it was there already."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_kd.cache.creation import discard
from cache_kd.cache.manifest import Manifest
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.writer import CacheWriter
from cache_kd.codecs import ViewCodec
from cache_kd.errors import CacheKDError, DiskSpaceError, MismatchError
from cache_kd.fingerprint import OtherIdentityError
from cache_kd.pipeline.contents import stored_columns
from cache_kd.pipeline.extract_settings import (
    ExtractSettings,
    data_file_of,
    device_of,
    loader_workers,
    recipe_of,
)
from cache_kd.pipeline.identity import cache_identity, codec_record, teacher_identity, with_command
from cache_kd.pipeline.locations import default_cache_path
from cache_kd.pipeline.packed import packed_arrays
from cache_kd.pipeline.sizes import megabytes
from cache_kd.pipeline.versions import cpu_threads, environment
from cache_kd.teacher.extract import PIXEL_HASH, Unit, encode_views, extract_units, open_units, places, view_batches
from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.gate import import_user_modules
from cache_kd.ultralytics_bridge.scan import CORRUPT
from cache_kd.ultralytics_bridge.settings import check_selection
from cache_kd.ultralytics_bridge.teacher import Teacher, load_teacher
from cache_kd.views.packing import parse_packing
from cache_kd.views.recipe import Recipe

LOG = logging.getLogger(__name__)
PROBE_BATCHES = 2
DISK_MARGIN = 1.05


@dataclass(frozen=True)
class Forecast:
    """What is about to be paid: views and bytes still to write, seconds, and the disk's free bytes."""

    views_open: int
    items_open: int
    bytes_per_item: float
    seconds: float
    free: int

    @property
    def bytes(self) -> float:
        return self.bytes_per_item * self.items_open


@dataclass(frozen=True)
class Extracted:
    """What an extraction leaves: the cache's folder, manifest and bytes; items done in this run and their seconds."""

    path: Path
    manifest: Manifest
    num_bytes: int
    items: int
    seconds: float


def extract(
    settings: ExtractSettings,
    *,
    say: Callable[[str], None] = LOG.info,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Run the teacher over every view that the cache does not hold yet; see `ExtractSettings`.

    Args:
        say: Takes a line for the user. progress: Takes (items done, items in all) after each batch.

    Raises:
        CacheKDError: One line about what is wrong; nothing half-written is left behind.
    """
    job = prepare(settings, say)
    with job.writer, _nothing_left(job):
        units = open_units(job.writer, settings.view_list)
        started = time.perf_counter()
        items = sum(len(unit.indices(job.writer.shard_size, len(job.dataset))) for unit in units)
        if units:
            _check_disk(_forecast(job, units, items), job.path, say)
            with torch_threads(cpu_threads()):
                _run(job, units, items, progress)
        else:
            say(f"{job.path}: every view is there already; more of them: --views {settings.views * 2 or 8}")
        manifest = job.writer.finish(settings.view_list, _manifest_fields(job))
    seconds = time.perf_counter() - started
    return Extracted(job.path, manifest, CacheReader(job.path).num_bytes, items, seconds)


@contextmanager
def _nothing_left(job: Job) -> Iterator[None]:
    """Remove a cache's folder, and those made for it, when its first extraction ends before the first unit."""
    try:
        yield
    except (CacheKDError, KeyboardInterrupt):
        if job.path in job.made and not any(job.path.glob("units/**/*.json")):
            discard(job.path)
            _remove_empty(job.made[1:])
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove these nested folders, the innermost first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@dataclass(frozen=True)
class Job:
    """An extraction that is ready to run: everything is loaded and checked, the cache is open for writing."""

    settings: ExtractSettings
    dataset: ViewDataset
    teacher: Teacher
    codec: ViewCodec
    writer: CacheWriter
    path: Path
    teacher_record: dict[str, Any]
    recipe: Recipe
    imgsz: int
    environment: dict[str, Any]
    made: tuple[Path, ...]


def prepare(settings: ExtractSettings, say: Callable[[str], None]) -> Job:
    """Check everything that can be checked before the first forward pass, and open the cache."""
    import_user_modules(settings.imports)
    checkpoint = load_teacher(settings.teacher, trusted=settings.trust_teacher)
    recorded = checkpoint.train_args
    data_file = data_file_of(settings, recorded)
    data = load_data(data_file, allow_download=settings.allow_download)
    recipe, imgsz = recipe_of(settings, recorded)
    device = settings.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    teacher_parts = teacher_identity(checkpoint)  # before it is turned to another precision or device
    teacher = Teacher(
        checkpoint,
        imgsz=imgsz,
        device=device_of(device),
        precision=settings.precision,
        store=settings.store,
        taps=settings.taps,
    )
    check_selection(recipe.to_json(), int(data["nc"]))
    packing = parse_packing(settings.pack)
    dataset = ViewDataset(data, recipe=recipe, imgsz=imgsz, seed=settings.seed, packing=packing)
    for fault in dataset.faults:
        say(f"skipped as Ultralytics would: {fault}")
    for note in dataset.notes:
        say(f"taken as Ultralytics would: {note}")
    sources = dataset.sources()
    codec = ViewCodec.create(settings.fidelity, teacher.head, imgsz, settings.store)
    identity = cache_identity(
        teacher=teacher_parts,
        sources=sources,
        recipe=recipe,
        imgsz=imgsz,
        seed=settings.seed,
        codec=codec,
        packing=packing,
        precision=settings.precision,
    )
    path = settings.cache or default_cache_path(f"{data_file.stem}-{settings.teacher.stem}", identity)
    _check_place(path, dataset)
    made = tuple(folder for folder in (path, *path.parents) if not folder.exists())
    try:
        writer = CacheWriter.open_or_create(
            path,
            identity=identity,
            data={"images": [source.to_json() for source in sources], "skipped": _skipped(dataset)},
            columns=stored_columns(codec, packing),
            num_images=len(dataset),
            teacher_arrays={**teacher.head_arrays(), **packed_arrays(dataset)},
        )
    except OtherIdentityError as error:
        raise with_command(error, path, settings.teacher) from error
    except (CacheKDError, KeyboardInterrupt):
        if not path.exists():
            _remove_empty(made[1:])
        raise
    record = {
        "file": settings.teacher.name,
        "file_sha256": checkpoint.file_sha256,
        "weights_sha256": checkpoint.weights_sha256,
        "head": teacher.head_recipe(),
        "data": str(data_file),
        "augment": dict(settings.augment or {}),
        "data_names": [str(data["names"][index]) for index in range(data["nc"])],
    }
    env = environment(device=device, batch=settings.batch, precision=settings.precision)
    return Job(settings, dataset, teacher, codec, writer, path, record, recipe, imgsz, env, made)


def _run(job: Job, units: Sequence[Unit], items: int, progress: Callable[[int, int], None] | None) -> None:
    done = 0

    def count(views: int) -> None:
        nonlocal done
        done += views
        if progress:
            progress(done, items)

    extract_units(
        units,
        dataset=job.dataset,
        teacher=job.teacher,
        codec=job.codec,
        writer=job.writer,
        batch=job.settings.batch,
        workers=loader_workers(job.settings),
        environment={**job.environment, "threads": torch.get_num_threads()},
        progress=count,
    )


def _forecast(job: Job, units: Sequence[Unit], items: int) -> Forecast:
    """Measure bytes and seconds of an item on the first batches; nothing of it is written."""
    rows: dict[str, list[np.ndarray]] = {}
    seconds, measured = 0.0, 0
    with torch_threads(cpu_threads()):
        probe = view_batches(
            job.dataset, units[:1], shard_size=job.writer.shard_size, batch=job.settings.batch, workers=0
        )
        started = time.perf_counter()
        for number, (unit, _, views) in enumerate(itertools.islice(probe, PROBE_BATCHES)):
            first = unit.shard * job.writer.shard_size + number * job.settings.batch
            place = places(job.dataset, unit.view, first)
            for row in encode_views(views, job.teacher, job.codec, batch=job.settings.batch, place=place):
                for name, values in row.items():
                    rows.setdefault(name, []).append(values)
            seconds, measured = time.perf_counter() - started, len(views)
            if number == 0:
                started = time.perf_counter()  # the first batch warms up; a second one is timed alone
    sampled = len(rows[PIXEL_HASH.name])
    free = shutil.disk_usage(_existing_parent(job.path)).free
    views_open = len({unit.view for unit in units})
    return Forecast(
        views_open, items, sum(job.writer.measure(rows).values()) / sampled, seconds / measured * items, free
    )


def _check_disk(forecast: Forecast, path: Path, say: Callable[[str], None]) -> None:
    say(
        f"{path}: {forecast.views_open} views to extract, {forecast.items_open} items, "
        f"about {megabytes(forecast.bytes)} ({forecast.bytes_per_item / 1e3:.1f} kB an item), "
        f"{megabytes(forecast.free)} free, about {forecast.seconds:.0f} s"
    )
    if forecast.bytes * DISK_MARGIN > forecast.free:
        raise DiskSpaceError(
            f"{path} needs about {megabytes(forecast.bytes)} and its disk has {megabytes(forecast.free)} free; "
            "choose fewer --views, --fidelity small or tiny, or another --cache"
        )


def _manifest_fields(job: Job) -> dict[str, Any]:
    return {
        "teacher": job.teacher_record,
        "head": job.teacher.head,
        "codec": codec_record(job.codec, job.dataset.packing),
        "imgsz": job.imgsz,
        "seed": job.settings.seed,
        "recipe": job.recipe.to_json(),
        "environment": job.environment,
    }


def _skipped(dataset: ViewDataset) -> list[str]:
    """Return what was skipped, without the folders of this machine."""
    prefixes = {str(Path(file).parent) + "/" for file in dataset.im_files}
    cleaned = []
    for fault in dataset.faults:
        for prefix in prefixes:
            fault = fault.replace(prefix, "")
        cleaned.append(fault.partition(CORRUPT)[0] + ": ignored as corrupt")
    return cleaned


def _check_place(path: Path, dataset: ViewDataset) -> None:
    for inside in dict.fromkeys(Path(file).parent for file in (*dataset.im_files, *dataset.label_files)):
        if path.resolve().is_relative_to(inside.resolve()):
            raise MismatchError(f"--cache {path} lies inside the data set's folder {inside}; choose another place")


def _existing_parent(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use `count` torch threads inside: importing or running Ultralytics may have left only one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
