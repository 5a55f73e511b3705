"""In: a recipe's plan. Out: its caches made and its runs done, several at once, each in a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock, Timeout

from cache_kd.cache.files import make_folder
from cache_kd.errors import CacheKDError
from cache_kd.pipeline.extraction import extract
from cache_kd.pipeline.recipes.cache_tasks import CacheTask
from cache_kd.pipeline.recipes.plan import (
    CHANGED,
    DONE,
    ELSEWHERE,
    ERROR,
    LOG,
    RESUME,
    PlannedRun,
    RecipePlan,
    RunTask,
    make_recipe_plan,
)
from cache_kd.pipeline.recipes.reading import read_recipe
from cache_kd.pipeline.recipes.results import Finished, RecipeResult, done_line, plan_lines, summary_lines
from cache_kd.pipeline.recoding import RecodeSettings, recode
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.report.record import FILE, RunRecord

Say = Callable[[str], None]
POLL_SECONDS = 0.2
REPLACED, COPYING = "replaced", ".copying"


class Started(Protocol):
    """A run that is being done."""

    def ended(self) -> int | None:
        """Return the exit code, None while it lasts."""
        ...

    def stop(self) -> None:
        """End it at once; what it has written stays."""
        ...


Start = Callable[[RunTask, int | None], Started]
"""Starts a run on a GPU, or on the CPU."""


def run_plan(
    plan: RecipePlan,
    *,
    jobs: int | None = None,
    say: Say,
    start: Start | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RecipeResult:
    """Make the caches that open runs need and do the runs that are not done.

    Args:
        jobs: runs at once; None takes the recipe's, else one a GPU, else half of the cores.
        start: starts a run; None starts a process. progress: of extractions.

    Raises:
        CacheKDError: A cache cannot be made, or another process runs this recipe.
    """
    make_folder(plan.folder)
    lock = FileLock(plan.folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CacheKDError(
            f"{plan.folder}: another process runs this recipe; wait for it, or look: ps aux | grep cache-kd"
        ) from None
    try:
        with lock:
            _copy_done(plan.elsewhere)
            failed = _make_caches(plan.caches, say, progress)
            ready = [run for run in plan.left if run.cache not in failed]
            errors = {run.name: f"cache {run.cache}: {failed[run.cache]}" for run in plan.left if run.cache in failed}
            for run in ready:
                _make_room(run)
            many = jobs or plan.recipe.jobs or default_jobs()
            errors |= train_all(ready, many, start or Worker, say)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"whole epochs and views stay, go on: {command(plan)}")
        raise
    return RecipeResult(plan, tuple(_finished(run, errors.get(run.name)) for run in plan.runs))


def command(plan: RecipePlan) -> str:
    """Return the command that goes on with a plan."""
    words = ["cache-kd", "run", str(plan.recipe.path)]
    for option, values in (("--set", plan.changes), ("--arm", plan.only)):
        for value in values:
            words += [option, value]
    return shlex.join(words)


def default_jobs() -> int:
    """Return how many runs are done at once: one a GPU, else half of the cores."""
    return torch.cuda.device_count() or max(1, cpu_threads() // 2)


def _make_caches(
    caches: Sequence[CacheTask], say: Say, progress: Callable[[int, int], None] | None
) -> dict[str | None, str]:
    """Make what is needed, sources first; return the names of those that failed and why."""
    failed: dict[str | None, str] = {}
    paths = {cache.name: cache.path for cache in caches}
    for cache in caches:
        if not cache.needed:
            continue
        say(f"cache {cache.name}")
        try:
            if cache.recode in failed and cache.recode is not None:
                raise CacheKDError(failed[cache.recode])
            if cache.extraction is not None:
                extract(cache.extraction, say=say, progress=progress)
            else:
                store = cache.settings.get("store")
                recode(
                    RecodeSettings(
                        paths[str(cache.recode)],
                        fidelity=cache.settings.get("fidelity"),
                        store=tuple(store) if store else None,
                        cache=cache.path,
                        data=cache.data,
                        jobs=min(8, cpu_threads()),
                    ),
                    say=say,
                    progress=progress,
                )
        except CacheKDError as error:
            failed[cache.name] = str(error)
            say(f"cache {cache.name}: {error}")
    return failed


def _make_room(run: PlannedRun) -> None:
    """Move away a finished run of other settings, and the remains of an unfinished one."""
    folder = Path(run.task.folder)
    if run.status not in (CHANGED, ELSEWHERE) or not folder.exists():
        return
    if not (folder / FILE).is_file():
        shutil.rmtree(folder)
        return
    with suppress(CacheKDError):
        kept = folder.parents[1] / REPLACED / folder.parent.name
        target = kept / f"{folder.name}-{RunRecord.read(folder / FILE).fingerprint[:8]}"
        make_folder(kept)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


def _copy_done(runs: Sequence[PlannedRun]) -> None:
    """Copy runs that are done in other folders; the record, which makes a run done, comes last."""
    copies = []
    for run in runs:  # all before room is made: two arms may have exchanged their names
        assert run.done_in is not None
        waiting = Path(f"{run.task.folder}{COPYING}")
        shutil.rmtree(waiting, ignore_errors=True)
        shutil.copytree(run.done_in, waiting, ignore=shutil.ignore_patterns(FILE))
        copies.append((run, waiting, RunRecord.read(run.done_in / FILE)))
    for run, waiting, record in copies:
        _make_room(run)
        waiting.rename(run.task.folder)
        task = run.task
        replace(record, recipe=task.recipe, study=task.study, arm=task.arm).write(Path(task.folder) / FILE)


def train_all(runs: Sequence[PlannedRun], jobs: int, start: Start, say: Say) -> dict[str, str]:
    """Do the runs, `jobs` at once, in their order; return one line for each that failed, by its name.

    Whatever ends this, a signal too, ends the runs.
    """
    waiting, active, errors = list(runs), dict[str, tuple[PlannedRun, Started, int | None]](), dict[str, str]()
    threads, gpus = max(1, cpu_threads() // jobs), torch.cuda.device_count()
    total, number = len(runs), 0
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                taken = [gpu for _, _, gpu in active.values()]
                gpu = min(range(gpus), key=taken.count) if gpus and "device" not in run.task.settings else None
                active[run.name] = (run, start(replace(run.task, threads=threads), gpu), gpu)
                say(f"{run.name}: {'goes on' if run.status == RESUME else 'starts'}")
            for name, (run, started, _) in list(active.items()):
                code = started.ended()
                if code is None:
                    continue
                del active[name]
                number += 1
                if code:
                    errors[name] = _why(run, code)
                record = None if code else RunRecord.read(Path(run.task.folder) / FILE)
                say(f"[{number}/{total}] {done_line(run, record, errors.get(name))}")
            if active:
                time.sleep(POLL_SECONDS)
    finally:
        for _, started, _ in active.values():
            started.stop()
    return errors


def _why(run: PlannedRun, code: int) -> str:
    """Return in one line why a run failed."""
    folder = Path(run.task.folder)
    try:
        text = (folder / ERROR).read_text(encoding="utf-8").strip()
    except OSError:
        text = f"ended by signal {-code}, as for want of memory" if code < 0 else f"ended with code {code}"
    return f"{text} (log: {folder / LOG})"


def _finished(run: PlannedRun, error: str | None) -> Finished:
    if error is not None:
        return Finished(run, None, error)
    return Finished(run, RunRecord.read(Path(run.task.folder) / FILE), None)


class Worker:
    """A run in a process of its own, whose words go to `log.txt` in its folder; it ends when this process does."""

    def __init__(self, task: RunTask, gpu: int | None) -> None:
        folder = Path(task.folder)
        make_folder(folder)
        (folder / ERROR).unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "PYTHONUNBUFFERED": "1"}
        if gpu is not None:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = seen[gpu] if gpu < len(seen) and seen[gpu] else str(gpu)
        with (folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cache_kd.pipeline.recipes.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the others
            )
        assert self._process.stdin is not None
        self._process.stdin.write(task.to_json().encode() + b"\n")
        self._process.stdin.flush()  # and stays open: its end is this process's end

    def ended(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            self._close()
        return code

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        with suppress(OSError):  # what its end never read
            if self._process.stdin is not None:
                self._process.stdin.close()


def run_recipe_file(
    path: Path,
    *,
    changes: Sequence[str] = (),
    arms: Sequence[str] = (),
    jobs: int | None = None,
    dry_run: bool = False,
    say: Say,
    progress: Callable[[int, int], None] | None = None,
) -> RecipeResult:
    """Check a recipe, show its plan and, unless this is a dry run, do what is left of it.

    Args:
        changes: words of `--set`. arms: those to do, all where none is named.

    Raises:
        RecipeError: Something is wrong with the recipe; all faults are said. CacheKDError: As `run_plan` raises.
    """
    recipe = read_recipe(path, changes, arms)
    plan = replace(make_recipe_plan(recipe, say), changes=tuple(changes), only=tuple(arms))
    for line in plan_lines(plan, jobs or plan.recipe.jobs or default_jobs()):
        say(line)
    if dry_run:
        return RecipeResult(plan, tuple(_finished(run, None) for run in plan.runs if run.status == DONE))
    result = run_plan(plan, jobs=jobs, say=say, progress=progress)
    for line in summary_lines(result):
        say(line)
    return result
