"""In: a teacher's checkpoint and what the user overrides. Out: a complete cache, topped up if it was there already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cache_kd.cache.disk import free_bytes, write_rate
from cache_kd.cache.manifest import Manifest
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.store import Place
from cache_kd.errors import DiskSpaceError
from cache_kd.pipeline.budget import MARGIN
from cache_kd.pipeline.default_losses import arrays_read
from cache_kd.pipeline.extract_settings import (
    ExtractSettings,
    loader_workers,
)
from cache_kd.pipeline.forecast import Forecast, Workload, forecast
from cache_kd.pipeline.identity import codec_record
from cache_kd.pipeline.leftovers import nothing_left
from cache_kd.pipeline.preparation import Job, prepare
from cache_kd.pipeline.probe import PROBE_ITEMS, torch_threads
from cache_kd.pipeline.quarantine import Quarantine
from cache_kd.pipeline.sizes import megabytes
from cache_kd.pipeline.unit_engines import run_units
from cache_kd.structures import KINDS
from cache_kd.teacher.extract import Unit, all_units, open_units

LOG = logging.getLogger(__name__)


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
        missing = len({(unit.view, unit.shard) for unit in units} - job.writer.records.named())
        manifest = None if missing else job.writer.finish(settings.view_list, _final_fields(job, units[0]))
    seconds = time.perf_counter() - started
    if manifest is None:
        say(
            f"part {settings.part} of {job.path} is done; {missing} of {len(units)} units are other parts' and open yet"
        )
        return Extracted(job.path, None, 0, items, seconds, missing)
    return Extracted(job.path, manifest, CacheReader(job.path).num_bytes, items, seconds)


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
        with torch_threads(job.crew.threads):
            _check_disk(_forecast(job, units), job.path, say)
            if not job.crew.alone:
                say(f"{job.path}: {job.crew}")
            run_units(job, units, progress)
    attempts.check()
    return items


def _forecast(job: Job, units: Sequence[Unit]) -> tuple[int, Forecast]:
    """Return how many views are open and what their units cost the job's crew, by a sample of their items."""
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
    return len(views), replace(found, seconds=found.seconds / min(job.crew.size, len(units)))


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
    record = job.writer.records.find(unit.view, unit.shard) if job.settings.engine == "ray" else None
    return {**fields, "environment": record.environment} if record else fields
