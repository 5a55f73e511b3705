"""In: teacher, data file, folder, number, seed. Out: what extractions killed at random moments became. A script.

A trial is a user's two commands, one view and then three, of which SIGKILL ends one at a random moment of the whole;
that one is repeated, and the other follows. Each command is forked from this process, which has imported everything and
loaded the teacher on one thread: threads do not survive a fork.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kill_extraction import SHARD, start
from small_inputs import without_times

from cache_kd.cache import creation, layout, writer
from cache_kd.pipeline import extraction, preparation
from cache_kd.teacher import extract as loop

STAGES = ((1, 0), (2, 1))
OPTIONS = ["--imgsz=64", "--batch=2", "--device=cpu", "--workers=0"]
PHASES = (
    "preparing",
    "creating the folder",
    "forecasting",
    "making views",
    "running the teacher",
    "writing a unit",
    "publishing a file",
    "finishing",
    "ended",
)


def mark(owner: Any, name: str, phase: int, now: mmap.mmap) -> None:
    """Have `owner.name` say, in memory that this process can read, that it is at work."""
    call: Callable[..., Any] = getattr(owner, name)

    def marked(*args: Any, **options: Any) -> Any:
        before, now[0] = now[0], phase
        try:
            return call(*args, **options)
        finally:
            now[0] = before

    setattr(owner, name, marked)


def watch(now: mmap.mmap) -> None:
    """Mark the phases of an extraction."""
    number = {phase: index for index, phase in enumerate(PHASES)}
    mark(creation, "create_or_check", number["creating the folder"], now)
    mark(extraction, "_forecast", number["forecasting"], now)
    mark(extraction, "_run", number["making views"], now)
    mark(loop, "encode_views", number["running the teacher"], now)
    mark(writer.CacheWriter, "write_unit", number["writing a unit"], now)
    for name in ("replace", "link", "unlink"):
        mark(os, name, number["publishing a file"], now)
    mark(writer.CacheWriter, "finish", number["finishing"], now)


def content(path: Path) -> dict[str, bytes]:
    """Return every file of a cache."""
    return {str(file.relative_to(path)): without_times(file) for file in path.rglob("*") if file.is_file()}


def different(path: Path, whole: dict[str, bytes]) -> list[str]:
    """Return the files in which the cache at `path` differs from `whole`."""
    found = content(path)
    return sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))


def commands(teacher: str, data: str, path: Path) -> list[list[str]]:
    """Return the two commands: the extraction and the top-up."""
    fixed = ["extract", "--teacher", teacher, "--data", data, "--cache", str(path), *OPTIONS]
    return [[*fixed, f"--views={mixed}", f"--plain-views={plain}"] for mixed, plain in STAGES]


def run_through(arguments: list[str], now: mmap.mmap) -> tuple[float, float]:
    """Run a command to its end; return the seconds that took, and those after its preparations."""
    begun, now[0] = time.monotonic(), 0
    child = start(arguments)
    wait_for_work(child, now)
    working = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise SystemExit(f"exit code {status}: {' '.join(arguments)}")
    return time.monotonic() - begun, time.monotonic() - working


def wait_for_work(child: int, now: mmap.mmap) -> None:
    """Wait until a command has begun to touch the cache, or ended."""
    while not now[0] and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.0005)


def trial(
    stages: list[list[str]], path: Path, stage: int, delay: float, now: mmap.mmap, *, prepared: bool
) -> dict[str, Any]:
    """Kill the command number `stage` after `delay` seconds (after its preparations), repeat it, do what follows."""
    for arguments in stages[:stage]:
        run_through(arguments, now)
    now[0] = 0
    child = start(stages[stage])
    if prepared:
        wait_for_work(child, now)
    time.sleep(delay)
    os.kill(child, signal.SIGSTOP)  # else the phase would be that of a moment before
    phase = PHASES[now[0]]
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = [file.name for file in path.rglob(".tmp-*")]
    report = {
        "stage": stage,
        "phase": phase if killed else "ended",
        "units": len(list((path / "units").glob("*.json"))),
        "temporary": len(left),
        "manifest": (path / "manifest.json").exists(),
    }
    for arguments in stages[stage:]:
        run_through(arguments, now)
    return report


def run(teacher: str, data: str, folder: Path, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    layout.MAX_SAMPLES = SHARD
    # A kill loses nothing that was written, synced or not, and on a busy disk most moments would be those of syncing.
    os.fsync = lambda _: None
    os.sched_setaffinity(0, {random.choice([*os.sched_getaffinity(0)])})  # one thread each
    loaded = preparation.load_teacher(Path(teacher))
    preparation.load_teacher = lambda *_, **__: loaded
    now = mmap.mmap(-1, 1)
    watch(now)
    reference = folder / "whole"
    seconds = [run_through(arguments, now) for arguments in commands(teacher, data, reference)]
    whole = content(reference)
    digest = json.loads(whole["manifest.json"])["digest"]
    generator = random.Random(seed)
    reports: list[dict[str, Any]] = []
    pace = 1.0  # a machine that others use too is faster at one time and slower at another
    while sum(report["phase"] != "ended" for report in reports) < count:
        path = folder / f"trial-{len(reports)}"
        # Every second moment is of the whole run, the others are of the part that touches the cache.
        kind = len(reports) % 2
        moment = generator.uniform(0, sum(times[kind] for times in seconds))
        stage = int(moment > seconds[0][kind])
        delay = pace * (moment - stage * seconds[0][kind])
        report = trial(commands(teacher, data, path), path, stage, delay, now, prepared=bool(kind))
        report["equal digest"] = json.loads((path / "manifest.json").read_bytes())["digest"] == digest
        report["different"] = different(path, whole)
        shutil.rmtree(path)
        reports.append(report)
        pace *= 0.8 if report["phase"] == "ended" else 1.03
    sys.stdout.write(json.dumps({"seconds": seconds, "trials": reports}))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
