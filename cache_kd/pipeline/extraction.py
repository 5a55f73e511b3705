"""In: a teacher's checkpoint and what the user overrides. Out: a complete cache, topped up if it was there already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_kd.cache.creation import discard
from cache_kd.cache.disk import free_bytes, write_rate
from cache_kd.cache.layout import shard_size
from cache_kd.cache.manifest import Manifest
from cache_kd.cache.places import open_store
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.store import Place
from cache_kd.cache.writer import CacheWriter
from cache_kd.codecs import FIDELITIES, ViewCodec
from cache_kd.errors import CacheKDError, DiskSpaceError, MismatchError
from cache_kd.fingerprint import OtherIdentityError, SourceImage, canonical_json
from cache_kd.pipeline.budget import MARGIN, Choice, ViewBytes, choose
from cache_kd.pipeline.contents import stored_columns
from cache_kd.pipeline.crew import crew_of, run_units
from cache_kd.pipeline.default_losses import arrays_read
from cache_kd.pipeline.extract_settings import (
    DEFAULT_FIDELITY,
    ExtractSettings,
    data_file_of,
    device_of,
    loader_workers,
    recipe_of,
)
from cache_kd.pipeline.forecast import Forecast, Workload, forecast, passes_of
from cache_kd.pipeline.identity import cache_identity, codec_record, teacher_identity, with_command
from cache_kd.pipeline.locations import default_cache_path
from cache_kd.pipeline.packed import packed_arrays
from cache_kd.pipeline.probe import ITEMS, MOST_ITEMS, Probed, probe, torch_threads
from cache_kd.pipeline.quarantine import Quarantine
from cache_kd.pipeline.sizes import megabytes
from cache_kd.pipeline.versions import cpu_threads, environment
from cache_kd.structures import KINDS, Column, View
from cache_kd.teacher.extract import Unit, all_units, open_units
from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.gate import import_user_modules
from cache_kd.ultralytics_bridge.scan import CORRUPT
from cache_kd.ultralytics_bridge.settings import check_selection
from cache_kd.ultralytics_bridge.teacher import Teacher, load_teacher
from cache_kd.views.packing import parse_packing
from cache_kd.views.recipe import Recipe

LOG = logging.getLogger(__name__)
PROBE_ITEMS = 16
"""Items of each kind of view that are looked at before an extraction."""


@dataclass(frozen=True)
class Extracted:
    """What an extraction leaves: the cache's place, manifest and bytes; items done in this run and their seconds.

    Attributes:
        manifest: None where units of other parts are missing; missing: how many.
    """

    path: Place
    manifest: Manifest | None
    num_bytes: int
    items: int
    seconds: float
    missing: int = 0


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
        UnitsError: Some units failed again and again; the others are committed.
        CacheKDError: One line about what is wrong; nothing half-written is left behind.
    """
    job = prepare(settings, say)
    settings = job.settings
    with job.writer, nothing_left(job.path, () if settings.part else job.made):
        units = all_units(job.writer, settings.view_list)
        mine = settings.part.of(units) if settings.part else units
        todo = open_units(job.writer, mine)
        started = time.perf_counter()
        items = 0
        if todo:
            job.writer.plan(settings.view_list, _manifest_fields(job), settings.part.count if settings.part else 1)
            items = _run(job, todo, say, progress)
        elif settings.part is None:
            say(f"{job.path}: every view is there already; more of them: --views {settings.views * 2 or 8}")
        missing = len({(unit.view, unit.shard) for unit in units} - job.writer.recorded())
        manifest = None if missing else job.writer.finish(settings.view_list, _final_fields(job, units[0]))
    seconds = time.perf_counter() - started
    if manifest is None:
        say(
            f"part {settings.part} of {job.path} is done; {missing} of {len(units)} units are other parts' and open yet"
        )
        return Extracted(job.path, None, 0, items, seconds, missing)
    return Extracted(job.path, manifest, CacheReader(job.path).num_bytes, items, seconds)


@contextmanager
def nothing_left(path: Place, made: Sequence[Place]) -> Iterator[None]:
    """Remove a cache's files, and the folders made for it, when its first extraction ends before the first unit."""
    try:
        yield
    except (CacheKDError, KeyboardInterrupt):
        with suppress(CacheKDError):  # a store that is out of reach: the next extraction goes on with what is there
            store = open_store(path)
            begun = (name for below in ("units", "attempts") for name, _ in store.files(below))
            if path in made and not any(name.endswith(".json") for name in begun):
                discard(store)
                remove_empty(made[1:])
        raise


def to_be_made(path: Place) -> tuple[Place, ...]:
    """Return the place of a cache and the folders around it that are not there yet, the innermost first."""
    if isinstance(path, Path):
        return tuple(folder for folder in (path, *path.parents) if not folder.exists())
    return ()  # nobody is kept out of a bucket: what lies there may be another extraction's beginning


def remove_empty(folders: Sequence[Place]) -> None:
    """Remove these nested folders, the innermost first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            if isinstance(folder, Path):
                folder.rmdir()


@dataclass(frozen=True)
class Plan:
    """An extraction of which all is loaded and checked, and nothing written."""

    settings: ExtractSettings
    dataset: ViewDataset
    teacher: Teacher
    teacher_parts: Mapping[str, Any]
    teacher_record: dict[str, Any]
    sources: tuple[SourceImage, ...]
    recipe: Recipe
    imgsz: int
    device: str
    name: str

    def codec(self, fidelity: str) -> ViewCodec:
        """Return the codec of a preset; raises `SettingError` for an unknown one."""
        return ViewCodec.create(fidelity, self.teacher.head, self.imgsz, self.settings.store)

    def identity(self, codec: ViewCodec) -> dict[str, Any]:
        """Return the identity of the cache that this extraction makes with `codec`."""
        return cache_identity(
            teacher=self.teacher_parts,
            sources=self.sources,
            recipe=self.recipe,
            imgsz=self.imgsz,
            seed=self.settings.seed,
            codec=codec,
            packing=self.dataset.packing,
            precision=self.settings.precision,
        )

    def path(self, codec: ViewCodec) -> Place:
        """Return the place of that cache; raises `MismatchError` for one inside the data set."""
        path = self.settings.cache or default_cache_path(self.name, self.identity(codec))
        _check_place(path, self.dataset)
        return path

    def columns(self, codec: ViewCodec) -> tuple[Column, ...]:
        """Return the columns of every view of that cache."""
        return stored_columns(codec, self.dataset.packing)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is kept once a cache: the teacher's head and, where views are packed, their source images."""
        return {**self.teacher.head_arrays(), **packed_arrays(self.dataset)}

    def data(self) -> dict[str, Any]:
        """Return the content of `data.json`."""
        return {"images": [source.to_json() for source in self.sources], "skipped": _skipped(self.dataset)}

    def probe(self, codecs: Mapping[str, ViewCodec], views: Sequence[View], *, items: int, most: int) -> Probed:
        """Return what a sample of the items of `views` takes."""
        with torch_threads(cpu_threads()):
            return probe(self.dataset, self.teacher, codecs, views, batch=self.settings.batch, items=items, most=most)

    def workload(
        self, codec: ViewCodec, views: Mapping[str, int], *, write_rate: float, fixed_bytes: int = 0
    ) -> Workload:
        """Return what an extraction of so many views of each kind does."""
        images = len(self.dataset)
        shard = shard_size(self.columns(codec))
        return Workload(
            items={kind: count * images for kind, count in views.items()},
            images=images,
            passes=sum(views.values()) * passes_of(images, shard, self.settings.batch),
            workers=loader_workers(self.settings),
            write_rate=write_rate,
            fixed_bytes=fixed_bytes,
        )

    def fixed_bytes(self) -> int:
        """Return the bytes that are written once, whatever the views: the teacher's head and the list of images."""
        return sum(array.nbytes for array in self.arrays().values()) + len(canonical_json(self.data()))


def make_plan(settings: ExtractSettings, say: Callable[[str], None]) -> Plan:
    """Load and check everything that can be checked before the first forward pass; nothing is written."""
    import_user_modules(settings.imports)
    checkpoint = load_teacher(settings.teacher, trusted=settings.trust_teacher)
    recorded = checkpoint.train_args
    data_file = data_file_of(settings, recorded)
    data = load_data(data_file, allow_download=settings.allow_download)
    recipe, imgsz = recipe_of(settings, recorded)
    named = settings.devices or ("cuda:0" if torch.cuda.is_available() else "cpu",)
    device, *_ = [device_of(name) for name in named]
    teacher_parts = teacher_identity(checkpoint)  # before it is turned to another precision or device
    teacher = Teacher(
        checkpoint,
        imgsz=imgsz,
        device=device,
        precision=settings.precision,
        store=settings.store,
        taps=settings.taps,
    )
    check_selection(recipe.to_json(), int(data["nc"]))
    dataset = ViewDataset(data, recipe=recipe, imgsz=imgsz, seed=settings.seed, packing=parse_packing(settings.pack))
    for fault in dataset.faults:
        say(f"skipped as Ultralytics would: {fault}")
    for note in dataset.notes:
        say(f"taken as Ultralytics would: {note}")
    record = {
        "file": settings.teacher.name,
        "file_sha256": checkpoint.file_sha256,
        "weights_sha256": checkpoint.weights_sha256,
        "head": teacher.head_recipe(),
        "data": str(data_file),
        "augment": dict(settings.augment or {}),
        "data_names": [str(data["names"][index]) for index in range(data["nc"])],
    }
    name, sources = f"{data_file.stem}-{settings.teacher.stem}", dataset.sources()
    return Plan(settings, dataset, teacher, teacher_parts, record, sources, recipe, imgsz, device, name)


def within_budget(plan: Plan, budget: int, probed: Probed, fixed_bytes: int) -> Choice:
    """Return the fidelity and the number of views that `--budget` allows, of the fidelities that were probed."""
    images, settings = len(plan.dataset), plan.settings
    sizes = {
        name: ViewBytes(images * probed.item_bytes(name, "mixed"), images * probed.item_bytes(name, "plain"))
        for name in probed.sizes
    }
    return choose(budget, sizes, views=settings.views, plain_views=settings.plain_views, fixed_bytes=fixed_bytes)


def budget_fidelities(settings: ExtractSettings) -> tuple[str, ...]:
    """Return the fidelities that a budget chooses from: the one asked for, else all but `exact`, the finest first."""
    return (settings.fidelity,) if settings.fidelity else tuple(name for name in FIDELITIES if name != "exact")


@dataclass(frozen=True)
class Job:
    """An extraction that is ready to run: the plan, and the cache, open for writing."""

    plan: Plan
    settings: ExtractSettings
    codec: ViewCodec
    writer: CacheWriter
    path: Place
    environment: dict[str, Any]
    made: tuple[Place, ...]
    probed: Probed | None = None

    @property
    def dataset(self) -> ViewDataset:
        return self.plan.dataset

    @property
    def teacher(self) -> Teacher:
        return self.plan.teacher


def prepare(settings: ExtractSettings, say: Callable[[str], None]) -> Job:
    """Check everything that can be checked before the first forward pass, and open the cache.

    With a budget some views are looked at before, and the settings of the job name what was chosen.
    """
    plan = make_plan(settings, say)
    probed = None
    if settings.budget is not None:
        codecs = {name: plan.codec(name) for name in budget_fidelities(settings)}
        probed = plan.probe(codecs, settings.view_list, items=ITEMS, most=MOST_ITEMS)
        choice = within_budget(plan, settings.budget, probed, plan.fixed_bytes())
        for line in choice.reason:
            say(line)
        settings = replace(settings, fidelity=choice.fidelity, views=choice.views)
    codec = plan.codec(settings.fidelity or DEFAULT_FIDELITY)
    path = plan.path(codec)
    made = to_be_made(path)
    try:
        writer = CacheWriter.open_or_create(
            path,
            identity=plan.identity(codec),
            data=plan.data(),
            columns=plan.columns(codec),
            num_images=len(plan.dataset),
            teacher_arrays=plan.arrays(),
            shared=settings.part is not None,
        )
    except OtherIdentityError as error:
        raise with_command(error, path, settings.teacher) from error
    except (CacheKDError, KeyboardInterrupt):
        remove_empty(made[1:])
        raise
    env = environment(device=plan.device, batch=settings.batch, precision=settings.precision)
    env["threads"] = crew_of(settings, plan.device, cpu_threads()).threads
    return Job(plan, settings, codec, writer, path, env, made, probed)


def _run(
    job: Job, todo: Sequence[Unit], say: Callable[[str], None], progress: Callable[[int, int], None] | None
) -> int:
    """Make units that are open and return how many items they have; what cannot be made is said at the end."""
    attempts = Quarantine(job.writer, todo, job.path)
    if job.settings.retry:
        attempts.lift()
    units = attempts.open()
    items = sum(len(unit.indices(job.writer.shard_size, len(job.dataset))) for unit in units)
    if units:
        crew = crew_of(job.settings, job.plan.device, cpu_threads())
        with torch_threads(crew.threads):
            _check_disk(_forecast(job, units, crew.size), job.path, say)
            if not crew.alone:
                say(f"{job.path}: {crew}")
            run_units(job, crew, units, progress)
    attempts.check()
    return items


def _forecast(job: Job, units: Sequence[Unit], workers: int) -> tuple[int, Forecast]:
    """Return how many views are open and what their units cost so many workers, by a sample of their items."""
    views = list(dict.fromkeys(unit.view for unit in units))
    name = job.codec.fidelity.name
    probed = job.probed or job.plan.probe({name: job.codec}, views, items=PROBE_ITEMS, most=PROBE_ITEMS)
    size, images = job.writer.shard_size, len(job.dataset)
    counts = [len(unit.indices(size, images)) for unit in units]
    items = {kind: sum(n for unit, n in zip(units, counts, strict=True) if unit.view.kind == kind) for kind in KINDS}
    work = Workload(
        items=items,
        images=images,
        passes=sum(-(-count // job.settings.batch) for count in counts),
        workers=loader_workers(job.settings),
        write_rate=write_rate(job.path),
    )
    found = forecast(probed, name, work, arrays_read(job.codec, job.dataset.packing))
    return len(views), replace(found, seconds=found.seconds / min(workers, len(units)))


def _check_disk(ahead: tuple[int, Forecast], path: Place, say: Callable[[str], None]) -> None:
    (views, forecast), free = ahead, free_bytes(path)
    say(
        f"{path}: {views} views to extract, {forecast.items} items, "
        f"about {megabytes(forecast.bytes)} ({forecast.bytes_per_view / 1e3:.1f} kB a view), "
        f"{'' if free is None else f'{megabytes(free)} free, '}about {forecast.seconds:.0f} s"
    )
    if free is not None and forecast.bytes * MARGIN > free:
        raise DiskSpaceError(
            f"{path} needs about {megabytes(forecast.bytes)} and its disk has {megabytes(free)} free; "
            "choose fewer --views, --fidelity small or tiny, or another --cache"
        )


def _manifest_fields(job: Job) -> dict[str, Any]:
    return {
        "teacher": job.plan.teacher_record,
        "head": job.teacher.head,
        "codec": codec_record(job.codec, job.dataset.packing),
        "imgsz": job.plan.imgsz,
        "seed": job.settings.seed,
        "recipe": job.plan.recipe.to_json(),
        "environment": job.environment,
    }


def _final_fields(job: Job, unit: Unit) -> dict[str, Any]:
    """Return the fields of the manifest; a Ray cluster's machines are not this one: its units say what they ran on."""
    fields = _manifest_fields(job)
    record = job.writer.record(unit.view, unit.shard) if job.settings.engine == "ray" else None
    return {**fields, "environment": record.environment} if record else fields


def _skipped(dataset: ViewDataset) -> list[str]:
    """Return what was skipped, without the folders of this machine."""
    prefixes = {str(Path(file).parent) + "/" for file in dataset.im_files}
    cleaned = []
    for fault in dataset.faults:
        for prefix in prefixes:
            fault = fault.replace(prefix, "")
        cleaned.append(fault.partition(CORRUPT)[0] + ": ignored as corrupt")
    return cleaned


def _check_place(path: Place, dataset: ViewDataset) -> None:
    for inside in dict.fromkeys(Path(file).parent for file in (*dataset.im_files, *dataset.label_files)):
        if isinstance(path, Path) and path.resolve().is_relative_to(inside.resolve()):
            raise MismatchError(f"--cache {path} lies inside the data set's folder {inside}; choose another place")
