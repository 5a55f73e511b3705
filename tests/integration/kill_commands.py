"""In: moments. Out: what real commands, started as a user starts them and killed at those moments, left behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from small_inputs import without_times

LOG = logging.getLogger(__name__)
COMMAND = [sys.executable, "-m", "cache_kd"]


def popen(arguments: Sequence[str], log: Path, folder: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a command of ours on one thread, as the leader of a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*COMMAND, *arguments], cwd=folder, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def finish(arguments: Sequence[str], log: Path, folder: Path | None = None) -> float:
    """Run a command to its end and return the seconds that took."""
    begun = time.monotonic()
    process = popen(arguments, log, folder)
    assert process.wait(timeout=300) == 0, log.read_text(errors="replace")[-2000:]
    return time.monotonic() - begun


def kill_after(arguments: Sequence[str], delay: float, log: Path, folder: Path | None = None) -> bool:
    """Kill a command after `delay` seconds; False if it ended before."""
    process = popen(arguments, log, folder)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def state(path: Path) -> str:
    """Say how far the cache at `path` is, by its files."""
    units = len(list((path / "units").glob("*.json")))
    if (path / "manifest.json").exists():
        listed = len(json.loads((path / "manifest.json").read_text())["views"])
        return "complete" if units <= listed else "topping up"
    if units:
        return "some units"
    return "begun" if (path / "zarr.json").exists() else "nothing yet"


def content(path: Path) -> dict[str, bytes]:
    """Return every file of a cache, its units' records without the seconds that they took."""
    return {str(file.relative_to(path)): without_times(file) for file in path.rglob("*") if file.is_file()}


def differing_files(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    """Return the names of files that are not in both with the same bytes."""
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))


def tell(what: str, seen: Iterable[Any]) -> None:
    """Log how many kills hit which phase."""
    counts = Counter(seen)
    LOG.warning("%s: %s", what, ", ".join(f"{count} {phase}" for phase, count in counts.most_common()))
