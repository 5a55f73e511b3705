"""Processes that share an extraction make the same cache, whatever dies; a poisoned unit is left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from poison import CRASH, KILL, KILL_ONCE, WAIT, heal, healed, poison, tried

from cache_kd.cache.attempts import Attempts
from cache_kd.cache.places import open_store
from cache_kd.cache.verify import verify_cache
from cache_kd.errors import UnitsError
from cache_kd.pipeline.extraction import Extracted, ExtractSettings, extract
from cache_kd.structures import View

VIEWS = 5
__all__ = ["healed"]


@pytest.fixture(scope="module")
def digest(teacher: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    done = run(teacher, few, tmp_path_factory.mktemp("whole") / "cache", processes=1)
    assert done.manifest is not None
    return done.manifest.digest


def run(teacher: Path, data: Path, path: Path, **options: Any) -> Extracted:
    settings: dict[str, Any] = {"imgsz": 64, "batch": 2, "device": "cpu", "workers": 0, "threads": 1, "processes": 2}
    watch = options.pop("progress", None)
    chosen = {**settings, **options}
    return extract(ExtractSettings(teacher, data, path, views=VIEWS - 1, plain_views=1, **chosen), progress=watch)


def test_two_processes_make_the_same_cache(digest: str, teacher: Path, few: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    module = poison(tmp_path, "none", "pass")
    done = run(
        teacher, few, tmp_path / "cache", imports=(module,), progress=lambda made, total: seen.append((made, total))
    )
    assert done.manifest is not None and done.manifest.digest == digest
    assert {total for _, total in seen} == {VIEWS * 4} and [made for made, _ in seen] == sorted(
        made for made, _ in seen
    )
    assert seen[-1] == (VIEWS * 4, VIEWS * 4)
    assert len({file.name.split("-")[2] for file in (tmp_path / "tried").iterdir()}) == 2, "both had some"
    units = [json.loads(file.read_text()) for file in (tmp_path / "cache" / "units").iterdir()]
    assert {unit["environment"]["threads"] for unit in units} == {1}
    assert done.manifest.environment["threads"] == 1
    assert verify_cache(tmp_path / "cache").notes == ()


def test_a_killed_process_loses_nothing(digest: str, teacher: Path, few: Path, tmp_path: Path) -> None:
    module = poison(tmp_path, "mixed-0001", KILL_ONCE)
    done = run(teacher, few, tmp_path / "cache", imports=(module,))
    assert done.manifest is not None and done.manifest.digest == digest
    assert tried(tmp_path)["mixed-0001"] == 3, "once in the process that was killed, two batches in another"
    record = json.loads((tmp_path / "cache" / "units" / "mixed-0001-00000.json").read_text())
    assert record["attempt"] == 2
    assert not (tmp_path / "cache" / "attempts").exists() and verify_cache(tmp_path / "cache").ok


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (KILL, "its process was killed by SIGKILL"),
        pytest.param(CRASH, "RuntimeError: CUDA out of memory", marks=pytest.mark.slow),
    ],
)
def test_a_poisoned_unit_is_left_out_and_the_rest_done(
    digest: str, teacher: Path, few: Path, tmp_path: Path, what: str, why: str
) -> None:
    path, module = tmp_path / "cache", poison(tmp_path, "mixed-0001", what)
    with pytest.raises(
        UnitsError, match=rf"1 of 5 units are quarantined after 3 attempts: mixed-0001 shard 0 \({why}\)"
    ):
        run(teacher, few, path, imports=(module,))
    assert tried(tmp_path)["mixed-0001"] == 3
    assert len(list((path / "units").iterdir())) == VIEWS - 1
    heal()
    done = run(teacher, few, path, processes=1, retry=True)
    assert done.items == 4 and done.manifest is not None and done.manifest.digest == digest


def test_an_interrupt_ends_all_and_leaves_a_whole_cache(digest: str, teacher: Path, few: Path, tmp_path: Path) -> None:
    module, path = poison(tmp_path, "mixed-0003", WAIT), tmp_path / "cache"
    words = [
        sys.executable, "-m", "cache_kd", "extract", "--teacher", str(teacher), "--data", str(few),
        "--cache", str(path), "--imgsz=64", "--batch=2", "--device=cpu", "--workers=0", "--threads=1",
        "--processes=2", f"--views={VIEWS - 1}", f"--import={module}",
    ]  # fmt: skip
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while "mixed-0003" not in tried(tmp_path) or len(tried(tmp_path)) < VIEWS:
        assert started.poll() is None
        time.sleep(0.05)
    children = psutil.Process(started.pid).children(recursive=True)
    began = time.monotonic()
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to every process of it
    _, said = started.communicate(timeout=60)
    assert time.monotonic() - began < 20 and started.returncode == 130
    assert "cache-kd: interrupted; what is committed stays" in said and "Traceback" not in said
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert Attempts(open_store(path)).counted() == {}, "an interrupt counts against no unit"
    assert (View("mixed", 3).name not in str(list((path / "units").iterdir()))) and not list(path.rglob(".tmp-*"))
    done = run(teacher, few, path, processes=1)
    assert done.manifest is not None and done.manifest.digest == digest


@pytest.mark.slow
def test_processes_whose_driver_is_killed_end_too(digest: str, teacher: Path, few: Path, tmp_path: Path) -> None:
    module, path = poison(tmp_path, "none", "pass"), tmp_path / "cache"
    module.write_text(module.read_text().replace("if name == 'none':", "if time.sleep(0.3) is None:"))
    words = [
        sys.executable, "-m", "cache_kd", "extract", "--teacher", str(teacher), "--data", str(few),
        "--cache", str(path), "--imgsz=64", "--batch=2", "--device=cpu", "--workers=0", "--threads=1",
        "--processes=2", f"--views={VIEWS - 1}", f"--import={module}",
    ]  # fmt: skip
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(path.glob("units/*.json")):
        assert started.poll() is None
        time.sleep(0.02)
    children = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert children and not alive
    assert Attempts(open_store(path)).counted() == {}
    done = run(teacher, few, path)
    assert done.manifest is not None and done.manifest.digest == digest
