"""In: one run of a recipe. Out: its training, begun or gone on with, its judgement, and its record."""

from __future__ import annotations

import json
import logging
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cache_kd.cache.files import write_atomic
from cache_kd.errors import InputDataError, MismatchError
from cache_kd.losses import parse_losses
from cache_kd.pipeline.cache_record import cache_record, read_bytes
from cache_kd.pipeline.recipes.plan import LOG, RunTask, read_state
from cache_kd.pipeline.recipes.recipe import COTRAINED
from cache_kd.pipeline.train_settings import NO_LOSSES, TrainSettings
from cache_kd.pipeline.training import train
from cache_kd.pipeline.versions import OTHER_PACKAGES, PIXEL_PACKAGES, cpu_threads, package_versions
from cache_kd.report.record import FILE, STATE, CostRecord, Judgement, MachineRecord, RunRecord
from cache_kd.report.run_folder import read_epochs
from cache_kd.ultralytics_bridge.baseline import drop_later_epochs, epoch_to_resume, run_trainer, train_stock
from cache_kd.ultralytics_bridge.cotrained import CotrainedTrainer
from cache_kd.ultralytics_bridge.data import load_data, split_files
from cache_kd.ultralytics_bridge.gate import import_user_modules, no_download_entries, safe_loading
from cache_kd.ultralytics_bridge.judge import judge
from cache_kd.ultralytics_bridge.teacher import load_teacher

LOGGER = logging.getLogger(__name__)
LOGGERS = ("cache_kd", "ultralytics", "py.warnings")
MOST_WARNINGS = 50


def carry_out(task: RunTask) -> RunRecord:
    """Train, judge and record one run in this process; its folder says how far an earlier process came.

    Raises:
        CacheKDError: One line about why it cannot be done.
    """
    folder = Path(task.folder)
    started, began = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    state = {"fingerprint": task.fingerprint, "started": began, "warnings": [], **(read_state(folder) or {})}
    with collected_warnings() as said:
        import_user_modules(task.imports)
        earlier = _earlier_seconds(folder)
        if not state.get("trained"):
            _note(folder, state)
            state["teacher_forwards"] = _trained(task)
            state = {**state, "trained": True, "seconds": earlier + time.perf_counter() - started}
            state["warnings"] = [*dict.fromkeys([*state["warnings"], *said])][:MOST_WARNINGS]
            _note(folder, state)
            started = time.perf_counter()
        judged = _judged(task)
    seconds = state["seconds"] + time.perf_counter() - started
    warnings = [*dict.fromkeys([*state["warnings"], *said])][:MOST_WARNINGS]
    record = _record(task, state, seconds, judged, warnings)
    record.write(folder / FILE)
    (folder / STATE).unlink(missing_ok=True)
    return record


def _note(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / STATE, json.dumps(state).encode())


def _earlier_seconds(folder: Path) -> float:
    """Return the seconds that whole epochs took in processes that were ended."""
    return read_epochs(folder)[-1].seconds if (folder / "results.csv").is_file() else 0.0


def _trained(task: RunTask) -> int:
    """Train to the end and return the images that went through the teacher, over all processes."""
    folder, epochs = Path(task.folder), int(task.settings["epochs"])
    last = folder / "weights" / "last.pt"
    epoch = epoch_to_resume(last, epochs)
    if epoch == epochs:  # ended between its last epoch and the note of it
        return _forwards(task, folder)
    if epoch is not None:
        try:
            _train(task, last, epoch)
            return _forwards(task, folder)
        except (MismatchError, InputDataError) as error:  # of what lies in the folder, or else it is raised again
            LOGGER.warning("%s cannot go on and begins again: %s", folder.name, error)
    _begin_again(folder)
    _train(task, last, None)
    return _forwards(task, folder)


def _train(task: RunTask, last: Path, epoch: int | None) -> None:
    """Train to the end; `epoch`: where to go on with `last`, None from the start."""
    if task.cache is not None:
        _from_cache(task, last if epoch is not None else None)
    else:
        _beside_teacher(task, last, epoch)


def _begin_again(folder: Path) -> None:
    """Remove what a process left that ended before its first checkpoint."""
    for path in folder.iterdir():
        if path.name in (STATE, LOG):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _from_cache(task: RunTask, last: Path | None) -> None:
    shared: dict[str, Any] = {
        "cache": Path(str(task.cache)),
        "data": Path(task.data),
        "threads": task.threads,
        "trust_student": task.trust_student,
    }
    if last is not None:
        train(TrainSettings(student="", settings={"resume": str(last), **_place(task)}, **shared))
        return
    own: dict[str, Any] = {
        "losses": task.losses or (NO_LOSSES,),
        "balance": task.balance,
        "views": task.views,
        "plain_views": task.plain_views,
        "name": Path(task.folder).name,
    }
    place = {"project": str(Path(task.folder).parent), "exist_ok": True, **_place(task)}
    train(TrainSettings(task.student, settings={**task.settings, **place, "seed": task.seed}, **shared, **own))


def _place(task: RunTask) -> dict[str, Any]:
    """Return the device's setting, where the recipe names one."""
    return {"device": task.settings["device"]} if "device" in task.settings else {}


def _beside_teacher(task: RunTask, last: Path, epoch: int | None) -> None:
    """Train in Ultralytics' own way, alone or with a live teacher; `epoch`: where to go on, None from the start."""
    folder = Path(task.folder)
    settings: dict[str, Any] = {
        **task.settings,
        **task.overrides,
        "model": task.student,
        "data": task.data,
        "task": "detect",
        "mode": "train",
        "seed": task.seed,
        "project": str(folder.parent),
        "name": folder.name,
        "exist_ok": True,
    }
    if task.mode == "online":
        settings["distill_model"] = task.teacher
    if epoch is not None:
        drop_later_epochs(folder, epoch)
        settings |= {"model": str(last), "resume": str(last), "save_dir": str(folder)}
    with safe_loading(trusted=task.trust_student or task.trust_teacher), no_download_entries():
        if task.mode == COTRAINED:
            checkpoint = load_teacher(Path(str(task.teacher)), trusted=task.trust_teacher)
            run_trainer(CotrainedTrainer(checkpoint, parse_losses(task.losses), settings), threads=task.threads)
        else:
            train_stock(settings, threads=task.threads)


def _forwards(task: RunTask, folder: Path) -> int:
    """Return the images that a live teacher saw: one a training image and epoch."""
    if task.teacher is None:
        return 0
    images = len(split_files(load_data(Path(task.data)), "train")[0])
    return images * len(read_epochs(folder))


def _judged(task: RunTask) -> Judgement:
    folder = Path(task.folder)
    torch.set_num_threads(task.threads)
    found = judge(
        folder / "weights" / f"{task.judge}.pt",
        data=Path(task.data),
        split=task.split,
        out=folder / "judged",
        trusted=task.trust_student,
        settings={"imgsz": task.imgsz, "batch": task.settings["batch"], **_place(task)},
    )
    return Judgement(task.judge, task.split, found.map50_95, found.map50, found.per_class)


def _record(task: RunTask, state: dict[str, Any], seconds: float, judged: Judgement, warnings: list[str]) -> RunRecord:
    gpu = torch.cuda.is_available()
    epochs = read_epochs(Path(task.folder))
    views = (task.views, task.plain_views)
    return RunRecord(
        recipe=task.recipe,
        study=task.study,
        arm=task.arm,
        mode=task.mode,
        seed=task.seed,
        student=Path(task.student).name,
        teacher=Path(task.teacher).name if task.teacher else None,
        data=Path(task.data).name,
        split=task.split,
        losses=task.losses,
        cache=cache_record(Path(task.cache), views) if task.cache is not None else None,
        settings={**task.settings, "imgsz": task.imgsz, **({} if task.cache else task.overrides)},
        fingerprint=task.fingerprint,
        versions=package_versions((*PIXEL_PACKAGES, *OTHER_PACKAGES)),
        machine=MachineRecord(
            processor=processor(),
            cores=cpu_threads(),
            gpu=torch.cuda.get_device_name() if gpu else None,
            threads=task.threads,
        ),
        started=state["started"],
        cost=CostRecord(
            seconds=seconds,
            teacher_forwards=state["teacher_forwards"],
            peak_memory_bytes=peak_memory(),
            device_memory_bytes=torch.cuda.max_memory_allocated() if gpu else None,
            bytes_read=read_bytes(Path(task.cache), task.losses) * len(epochs) if task.cache is not None else None,
        ),
        epochs=epochs,
        judged=judged,
        warnings=tuple(warnings),
    )


def peak_memory() -> int:
    """Return the most resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """Return the processor's name as the machine tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class _Collector(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split()).removeprefix("WARNING ⚠️ ")  # Ultralytics' formatter adds it
        self.lines.append(text[:500])


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what is warned of inside, by this package, Ultralytics and Python."""
    lines: list[str] = []
    handler = _Collector(lines)
    logging.captureWarnings(True)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        logging.captureWarnings(False)
