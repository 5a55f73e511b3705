"""An extraction may be killed, repeated and enlarged: the cache is the one of a single undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_inputs import IMAGES

from cache_kd.cache.verify import verify_cache
from cache_kd.errors import DamagedCacheError, MismatchError
from cache_kd.pipeline.extraction import Extracted, ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.structures import View
from cache_kd.views.seeding import pixel_hash

IMGSZ = 64
UNITS = 9  # three views of three shards


def run(teacher: Path, data: Path, path: Path, mixed: int = 2, plain: int = 1, **options: Any) -> Extracted:
    settings: dict[str, Any] = {"imgsz": IMGSZ, "batch": 2, "device": "cpu", "workers": 0, **options}
    return extract(ExtractSettings(teacher, data=data, cache=path, views=mixed, plain_views=plain, **settings))


def states(path: Path, *views: View) -> dict[str, tuple[int, int, bytes]]:
    """Return inode, time and content of all files of some views, by path."""
    found = {}
    for view in views:
        for file in sorted((path / "views" / view.name).rglob("*")):
            if file.is_file():
                status = file.stat()
                found[str(file)] = (status.st_ino, status.st_mtime_ns, file.read_bytes())
    return found


# -- killed ---------------------------------------------------------------------------------------------------------


def kill_trials(teacher: Path, data: Path, folder: Path, trials: list[list[int]]) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("kill_extraction.py")
    done = subprocess.run(
        [sys.executable, str(script), str(teacher), str(data), str(folder), json.dumps(trials)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return reports


def check_trials(reports: list[dict[str, Any]]) -> None:
    whole, *killed = reports
    for report in killed:
        assert all(report["killed"]), "an extraction ended before its moment"
        assert not any(report["manifest"]), "an unfinished cache has no manifest"
        pairs = zip(report["moments"], report["units"], strict=True)
        assert all(wanted <= found < UNITS for wanted, found in pairs)
        assert report["status"] == 0
        assert report["changed"] == [], "a finished unit was done again"
        assert report["leftovers"] == []
        assert report["digest"] == whole["digest"], report["moments"]


def test_killed_extractions_end_as_one_undisturbed(teacher: Path, data_file: Path, tmp_path: Path) -> None:
    check_trials(kill_trials(teacher, data_file, tmp_path, [[0], [1, 4, 7]]))


@pytest.mark.slow
def test_extractions_killed_after_every_unit_end_as_one_undisturbed(
    teacher: Path, data_file: Path, tmp_path: Path
) -> None:
    check_trials(kill_trials(teacher, data_file, tmp_path, [*[[units] for units in range(UNITS)], [0, 0, 1, 2, 5]]))


@pytest.mark.slow
def test_the_command_itself_is_killed(teacher: Path, data_file: Path, tmp_path: Path) -> None:
    """The stock command with stock shards, killed from outside: one unit a view."""
    options = ["--views=5", "--plain-views=1", "--imgsz=64", "--batch=2", "--device=cpu", "--workers=0", "--json"]
    start = [sys.executable, "-m", "cache_kd", "extract", "--teacher", str(teacher), "--data", str(data_file)]
    whole = subprocess.run([*start, "--cache", str(tmp_path / "whole"), *options], capture_output=True, check=True)
    path = tmp_path / "killed"
    for units in (0, 1, 3, 5):
        process = subprocess.Popen([*start, "--cache", str(path), *options], stdout=subprocess.DEVNULL)
        while len(list((path / "units").glob("*.json"))) < units or not (path / "zarr.json").exists():
            assert process.poll() is None, "the command ended before its moment"
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(DamagedCacheError, match="unfinished"):
            Cache(path)
    done = subprocess.run([*start, "--cache", str(path), *options], capture_output=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["digest"] == json.loads(whole.stdout)["digest"]
    assert 0 < summary["items_extracted"] <= IMAGES, "only the last view was left to do"


@pytest.mark.parametrize("batches", [1, 11])
def test_an_interrupt_between_batches_loses_nothing(
    teacher: Path,
    data_file: Path,
    tmp_path: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
) -> None:
    whole = run(teacher, data_file, tmp_path / "whole")
    seen = 0

    def interrupt(done: int, items: int) -> None:
        nonlocal seen
        seen += 1
        if seen == batches:
            raise KeyboardInterrupt

    path = tmp_path / "interrupted"
    options: dict[str, Any] = {"views": 2, "plain_views": 1, "imgsz": IMGSZ, "batch": 2, "device": "cpu", "workers": 0}
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        extract(ExtractSettings(teacher, data=data_file, cache=path, **options), progress=interrupt)
    assert not (path / "manifest.json").exists()
    done = run(teacher, data_file, path)
    assert done.manifest.digest == whole.manifest.digest
    # five batches a view, in shards of two, two and one
    committed = [2, 4, 5, 7, 9, 10, 12, 14, 15]
    samples = [4, 8, 10, 14, 18, 20, 24, 28, 30]
    kept = max([n for end, n in zip(committed, samples, strict=True) if end <= batches], default=0)
    assert done.items == 3 * IMAGES - kept


# -- enlarged -------------------------------------------------------------------------------------------------------


def test_topping_up_is_extracting_in_one_go(teacher: Path, data_file: Path, tmp_path: Path, small_shards: None) -> None:
    whole = run(teacher, data_file, tmp_path / "whole", mixed=3, plain=2)
    path = tmp_path / "grown"
    steps = [(1, 0), (1, 1), (3, 1), (3, 2)]
    before: dict[str, tuple[int, int, bytes]] = {}
    views: tuple[View, ...] = ()
    for number, (mixed, plain) in enumerate(steps):
        done = run(teacher, data_file, path, mixed=mixed, plain=plain)
        assert done.manifest.views == tuple(
            [View("mixed", n) for n in range(mixed)] + [View("plain", n) for n in range(plain)]
        )
        assert done.items == IMAGES * (len(done.manifest.views) - len(views)), "views that were there were done again"
        views = done.manifest.views
        now = states(path, *views)
        assert {name: now[name] for name in before} == before, "files of older views were touched"
        before = now
        assert number == len(steps) - 1 or done.manifest.digest != whole.manifest.digest
    assert done.manifest.digest == whole.manifest.digest
    assert verify_cache(path).ok


def test_asking_for_fewer_views_keeps_those_that_are_there(
    teacher: Path, data_file: Path, tmp_path: Path, small_shards: None
) -> None:
    first = run(teacher, data_file, tmp_path / "cache", mixed=2, plain=1)
    again = run(teacher, data_file, tmp_path / "cache", mixed=1, plain=0)
    assert again.items == 0
    assert again.manifest.views == first.manifest.views and again.manifest.digest == first.manifest.digest


def test_another_cache_is_never_topped_up(teacher: Path, data_file: Path, tmp_path: Path, small_shards: None) -> None:
    first = run(teacher, data_file, tmp_path / "cache", mixed=1, plain=0)
    before = states(first.path, View("mixed", 0))
    with pytest.raises(MismatchError, match=r"is a cache of something else .*seed: 0 there, 1 wanted"):
        run(teacher, data_file, tmp_path / "cache", mixed=2, plain=0, seed=1)
    assert states(first.path, View("mixed", 0)) == before
    assert Cache(first.path).manifest.digest == first.manifest.digest


# -- how it is run --------------------------------------------------------------------------------------------------


def test_the_number_of_workers_changes_nothing(
    teacher: Path, data_file: Path, tmp_path: Path, small_shards: None
) -> None:
    alone = run(teacher, data_file, tmp_path / "alone", workers=0)
    shared = run(teacher, data_file, tmp_path / "shared", workers=2)
    assert shared.manifest.digest == alone.manifest.digest
    for view in alone.manifest.views:
        ours, theirs = (states(done.path, view) for done in (alone, shared))
        assert [state[2] for state in ours.values()] == [state[2] for state in theirs.values()]


def test_several_shards_read_back_in_order(teacher: Path, data_file: Path, tmp_path: Path, small_shards: None) -> None:
    done = run(teacher, data_file, tmp_path / "cache")
    assert len(list((done.path / "units").glob("*.json"))) == UNITS
    cache = Cache(done.path)
    found = set()
    for view in cache.views:
        for index in range(IMAGES):
            stored = cache.read(view.number, index, plain=view.kind == "plain").pixel_hash
            assert stored == pixel_hash(cache.pixels(view.number, index, plain=view.kind == "plain"))
            found.add(stored)
    assert len(found) == 3 * IMAGES
