"""In: an extraction that is ready to run, and who is to share it. Out: its units, made by the engine for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from cache_kd.cache.store import Place
from cache_kd.engines.board import Advanced, Board, Engine, Event, Lost
from cache_kd.engines.local import LocalEngine
from cache_kd.engines.processes import ProcessesEngine
from cache_kd.engines.ray import RayEngine
from cache_kd.errors import CacheKDError, UnitsError
from cache_kd.pipeline.extract_settings import loader_workers
from cache_kd.pipeline.preparation import Job
from cache_kd.pipeline.quarantine import named
from cache_kd.pipeline.unit_worker import ExtractionWorker, ShippedMaker, WorkerMaker
from cache_kd.teacher.extract import Unit


def run_units(job: Job, units: Sequence[Unit], progress: Callable[[int, int], None] | None) -> None:
    """Have the units made; those that cannot be are left, counted in the cache.

    Raises:
        UnitsError: nothing could be made at all. CacheKDError: what no unit is to blame for.
    """
    sizes = {unit: len(unit.indices(job.writer.shard_size, len(job.dataset))) for unit in units}
    board, items = Board(units, sizes), sum(sizes.values())

    def tell(event: Event) -> None:
        job.writer.sign()
        if isinstance(event, Lost) and isinstance(event.unit, Unit):
            job.writer.attempts.fail(event.unit.view, event.unit.shard, event.reason)
        if progress and isinstance(event, Advanced):
            progress(board.items_done, items)

    try:
        _engine(job).run(board, tell)
    except KeyboardInterrupt:
        with suppress(CacheKDError):
            for unit in board.held:
                job.writer.attempts.excuse(unit.view, unit.shard)
        raise
    if board.hopeless:
        faults = {unit: reason for unit, reason in board.faults.items() if isinstance(unit, Unit)}
        raise UnitsError(
            f"{job.path}: stopped, for {board.hopeless}{': ' if faults else ''}{named(faults)}; "
            "put that right and run the same command again"
        )


def _engine(job: Job) -> Engine:
    settings, crew = job.settings, job.crew
    if settings.engine == "ray":
        return RayEngine(
            _shipped(job), settings.processes, settings.threads, settings.address, gpus=settings.device != "cpu"
        )
    if crew.alone:
        loaders = loader_workers(settings)
        return LocalEngine(
            ExtractionWorker(job.dataset, job.teacher, job.codec, job.writer, settings.batch, loaders, job.environment)
        )
    job.teacher.model.cpu()  # the GPU is the workers'
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    loaders = loader_workers(settings, crew.size)
    return ProcessesEngine([_maker(job, device, crew.threads, loaders) for device in crew.devices])


def _maker(job: Job, device: str, threads: int, loaders: int) -> WorkerMaker:
    plan = job.plan
    return WorkerMaker(
        settings=replace(job.settings, device=device, processes=None),
        identity=plan.identity(job.codec),
        place=job.path,
        imgsz=plan.imgsz,
        dataset=job.dataset,
        threads=threads,
        loaders=loaders,
        teacher=job.settings.teacher,
    )


def _shipped(job: Job) -> ShippedMaker:
    """Return the maker with the files that other machines need not have."""
    files = tuple((file.name, file.read_bytes()) for file in (job.settings.teacher, *job.settings.imports))
    maker = _maker(job, job.settings.device or "", threads=1, loaders=0)
    return ShippedMaker(replace(maker, place=absolute(job.path)), files)


def absolute(place: Place) -> Place:
    """Return a place as it is called from any working directory."""
    return place.absolute() if isinstance(place, Path) else place
