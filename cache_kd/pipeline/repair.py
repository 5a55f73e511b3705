"""In: a damaged cache, its teacher and its data set. Out: the same cache, the same digest; or why not, in one line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cache_kd.cache.manifest import Manifest
from cache_kd.cache.repair import CacheRepair, Lost
from cache_kd.cache.store import Place
from cache_kd.cache.verify import VerifyReport, verify_cache
from cache_kd.errors import MismatchError, SettingError
from cache_kd.fingerprint import differences, listed
from cache_kd.pipeline.extract_settings import ExtractSettings, loader_workers
from cache_kd.pipeline.opened import recorded_data_file
from cache_kd.pipeline.preparation import Job, prepare
from cache_kd.pipeline.probe import torch_threads
from cache_kd.pipeline.verification import Verification
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.teacher.extract import Unit, extract_units

_NAMED = 8


def repair(
    path: Place,
    *,
    teacher: Path | None = None,
    data: Path | None = None,
    trust_teacher: bool = False,
    imports: tuple[Path, ...] = (),
    jobs: int = 1,
    say: Callable[[str], None],
    reading: Callable[[int, int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Put back what is damaged in the cache at `path` and return what a verification finds afterwards.

    Metadata is written again from the manifest; targets, the teacher's arrays and the list of images only with
    `teacher`, by extracting the damaged units again, in a temporary folder. A file is replaced only by bytes that have
    the sha256 of the lost ones: digest and manifest stay what they were.

    Raises:
        MismatchError: another teacher, data set or version of a library; or this machine makes other bytes.
        DamagedCacheError: a manifest that is damaged itself. CacheKDError: a writer is at work.
    """
    if not isinstance(path, Path):
        raise SettingError(
            f"{path}: --repair mends folders; delete the damaged objects and run the same `cache-kd extract` again, it "
            "makes their units anew"
        )
    with CacheRepair(path) as cache:
        report = verify_cache(path, jobs=jobs, progress=reading)
        if report.ok:
            say(f"{path}: nothing to repair")
            return Verification(report)
        lost = cache.lost(fault.file for fault in report.faults)
        if lost.needs_teacher and teacher is not None:
            with tempfile.TemporaryDirectory(prefix="cache-kd-repair-") as folder:
                scratch = Path(folder, "cache")
                settings = _settings(cache.manifest, path, teacher, data, scratch)
                job = prepare(replace(settings, trust_teacher=trust_teacher, imports=imports), say)
                with job.writer:
                    cache.check_source(scratch)
                    cache.put_own(lost)
                    cache.take_sources(lost, scratch)
                    _extract_again(cache, lost, job, progress)
        else:
            cache.put_own(lost)
        after = verify_cache(path, jobs=jobs)
        say(_summary(path, report, after, cache.manifest))
        return Verification(after)


def _settings(manifest: Manifest, path: Path, teacher: Path, data: Path | None, scratch: Path) -> ExtractSettings:
    """Return the settings of the extraction that made the cache, as far as the manifest tells."""
    device = manifest.environment["device"]
    return ExtractSettings(
        teacher,
        data=data if data is not None else recorded_data_file(path, manifest),
        cache=scratch,
        imgsz=manifest.imgsz,
        batch=int(manifest.environment["batch"]),
        device=f"{device}:0" if device == "cuda" and torch.cuda.is_available() else "cpu",
        seed=manifest.seed,
        store=tuple(manifest.codec["store"]),
        taps=tuple(tap.name for tap in manifest.head.layers),
        fidelity=manifest.codec["fidelity"],
        pack=manifest.codec["pack"]["spec"],
        precision=manifest.identity["precision"],
        augment=manifest.recipe,
    )


def _extract_again(cache: CacheRepair, lost: Lost, job: Job, progress: Callable[[int, int], None] | None) -> None:
    """Make each damaged unit again as it was made before, and take of it what is damaged."""
    for number, (view, shard) in enumerate(lost.units):
        recorded = cache.environment(view, shard)
        batch = int(recorded["batch"])
        with torch_threads(int(recorded.get("threads") or cpu_threads())):
            environment = {**job.environment, "batch": batch, "threads": torch.get_num_threads()}
            extract_units(
                [Unit(view, shard)],
                dataset=job.dataset,
                teacher=job.teacher,
                codec=job.codec,
                writer=job.writer,
                batch=batch,
                workers=loader_workers(job.settings),
                environment=environment,
            )
        try:
            cache.take_unit(lost, Path(str(job.path)), view, shard)
        except MismatchError as error:
            raise MismatchError(f"{cache.path}: {error}; {_explanation(recorded, environment)}") from error
        if progress:
            progress(number + 1, len(lost.units))


def _explanation(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return why a teacher may say something else than it did, and what can be done."""
    changed = listed(differences(recorded, now)) or "device, threads, batch and versions are those recorded"
    return (
        f"{changed}; the unit is left as it was: repair it on a machine like the first, or extract another cache: "
        "cache-kd extract --cache DIR"
    )


def _summary(path: Path, before: VerifyReport, after: VerifyReport, manifest: Manifest) -> str:
    left = {fault.file for fault in after.faults}
    done = sorted({fault.file for fault in before.faults} - left)
    more = f" and {len(done) - _NAMED} more" if len(done) > _NAMED else ""
    text = f"{path}: {len(done)} files repaired" + (f" ({', '.join(done[:_NAMED])}{more})" if done else "")
    if after.ok:
        return f"{text}; digest {manifest.digest[:16]} as before"
    return f"{text}; {len(left)} files need the teacher: cache-kd verify {path} --repair --teacher best.pt"
