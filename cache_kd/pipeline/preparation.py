"""In: what the user asks of an extraction. Out: all of it loaded and checked, and its cache open for writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_kd.cache.layout import shard_size
from cache_kd.cache.store import Place
from cache_kd.cache.writer import CacheWriter
from cache_kd.codecs import FIDELITIES, ViewCodec
from cache_kd.errors import CacheKDError, MismatchError
from cache_kd.fingerprint import OtherIdentityError, SourceImage, canonical_json
from cache_kd.pipeline.budget import Choice, ViewBytes, choose
from cache_kd.pipeline.contents import stored_columns
from cache_kd.pipeline.crew import Crew, crew_of
from cache_kd.pipeline.extract_settings import (
    DEFAULT_FIDELITY,
    ExtractSettings,
    data_file_of,
    device_of,
    loader_workers,
    recipe_of,
)
from cache_kd.pipeline.forecast import Workload, passes_of
from cache_kd.pipeline.identity import cache_identity, teacher_identity, with_command
from cache_kd.pipeline.leftovers import remove_empty, to_be_made
from cache_kd.pipeline.locations import default_cache_path
from cache_kd.pipeline.packed import packed_arrays
from cache_kd.pipeline.probe import ITEMS, MOST_ITEMS, Probed, probe, torch_threads
from cache_kd.pipeline.versions import cpu_threads, environment
from cache_kd.structures import Column, View
from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.gate import import_user_modules
from cache_kd.ultralytics_bridge.scan import CORRUPT
from cache_kd.ultralytics_bridge.settings import check_selection
from cache_kd.ultralytics_bridge.teacher import Teacher, load_teacher
from cache_kd.views.packing import parse_packing
from cache_kd.views.recipe import Recipe


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
    crew: Crew
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
    crew = crew_of(settings, plan.device, cpu_threads())
    env["threads"] = crew.threads
    return Job(plan, settings, codec, writer, path, env, made, crew, probed)


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
