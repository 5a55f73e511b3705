"""In: teacher, data file, folder, moments. Out: what extractions killed at those moments left and became. A script.

The moments are JSON: a list of trials, each a list of how many units are recorded when SIGKILL comes, one number for
each start of the same command; the last start of a trial is left to end. Extractions are forked from this process,
which has imported everything once; it must compute nothing itself, since threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cache_kd.cache import layout
from cache_kd.cli import main as command_line
from cache_kd.pipeline import extraction

SHARD = 4
OPTIONS = ["--views=2", "--plain-views=1", "--imgsz=64", "--batch=2", "--device=cpu", "--workers=0"]
assert extraction  # imported for the forked processes


def start(arguments: list[str]) -> int:
    """Run the command line in a forked process and return its id."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        status = 1
        try:
            command_line(arguments, standalone_mode=False)
            status = 0
        finally:
            os._exit(status)
    return child


def files(path: Path) -> dict[str, list[int]]:
    """Return inode, bytes and time of every file of the finished units, by path in the cache."""
    found = {}
    for record in sorted((path / "units").glob("*.json")):
        for entry in json.loads(record.read_text())["files"]:
            status = (path / entry["path"]).stat()
            found[entry["path"]] = [status.st_ino, status.st_size, status.st_mtime_ns]
    return found


def kill_at(child: int, path: Path, units: int) -> bool:
    """Kill the process as soon as the cache has this many unit records; False if it ended before."""
    while len(list((path / "units").glob("*.json"))) < units or not (path / "zarr.json").exists():
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def trial(arguments: list[str], path: Path, moments: list[int]) -> dict[str, Any]:
    """Kill one extraction at each of `moments`, then let it end."""
    kept: dict[str, list[int]] = {}
    report: dict[str, Any] = {"moments": moments, "killed": [], "units": [], "manifest": [], "changed": []}
    for units in moments:
        report["killed"].append(kill_at(start(arguments), path, units))
        report["units"].append(len(list((path / "units").glob("*.json"))))
        report["manifest"].append((path / "manifest.json").exists())
        kept.update(files(path))
    report["status"] = os.waitstatus_to_exitcode(os.waitpid(start(arguments), 0)[1])
    now = files(path)
    report["changed"] = [name for name, state in kept.items() if now.get(name) != state]
    report["digest"] = json.loads((path / "manifest.json").read_text())["digest"]
    report["leftovers"] = [str(file) for file in path.rglob(".tmp-*")]
    return report


def run(teacher: str, data: str, folder: Path, trials: list[list[int]]) -> None:
    layout.MAX_SAMPLES = SHARD
    # A kill loses nothing that was written, synced or not, and one core has no other thread to wait for.
    os.fsync = lambda _: None
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    reports = []
    for number, moments in enumerate([[], *trials]):
        path = folder / f"trial-{number}"
        arguments = ["extract", "--teacher", teacher, "--data", data, "--cache", str(path), *OPTIONS]
        reports.append(trial(arguments, path, moments))
    sys.stdout.write(json.dumps(reports))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
