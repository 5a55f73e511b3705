"""A recipe of real runs: killed in every arm it goes on, the last call finds nothing to do, records tell all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from student_runs import results

import cache_kd
from cache_kd.cli import main
from cache_kd.errors import RecipeError
from cache_kd.report.record import RunRecord

EPOCHS = 4
SECONDS = 240
RECIPE = f"""\
name: small
question: Does all of it work?
teacher: best.pt
data: {{data}}
student: yolov8n.yaml
imgsz: 64
epochs: {EPOCHS}
batch: 4
seeds: [0]
split: val
judge: last
settings: {{{{close_mosaic: 1, plots: false, amp: false, workers: 0, device: cpu}}}}
caches:
  fine: {{{{views: 3, plain_views: 1, fidelity: default, batch: 4, device: cpu, workers: 0}}}}
  coarse: {{{{recode: fine, fidelity: tiny}}}}
arms:
  plain: {{{{mode: plain}}}}
  cached: {{{{mode: cached, cache: fine, losses: [cwd, ld], views: 2}}}}
  recoded: {{{{mode: cached, cache: coarse, losses: [cwd]}}}}
  online: {{{{mode: online}}}}
"""


@pytest.fixture
def work(tmp_path: Path, few_images: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a recipe and its teacher."""
    shutil.copyfile(test_data / "weights" / "yolov8s-bccd.pt", tmp_path / "best.pt")
    shutil.copytree(few_images.parent, tmp_path / "set")
    (tmp_path / "small.yaml").write_text(RECIPE.format(data=f"set/{few_images.name}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CACHE_KD_CACHE", raising=False)
    return tmp_path


def start(work: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "cache_kd", "run", "small.yaml"]
    path = os.pathsep.join([str(Path(cache_kd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(words, cwd=work, env=environment, stdout=subprocess.PIPE, text=True)


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def kill_in(arm: str, work: Path) -> None:
    """Kill the command when a run has a whole checkpoint; the process of that run must end with it."""
    command = start(work)
    last = work / "runs" / "small" / f"{arm}-s0" / "weights" / "last.pt"
    until = time.monotonic() + SECONDS
    while not last.is_file() or time.time() - last.stat().st_mtime < 0.2:
        assert command.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    workers = children(command.pid)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    assert len(workers) == 1
    while Path(f"/proc/{workers[0]}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_recipe_survives_kills_and_skips_what_is_done(work: Path) -> None:
    runs = work / "runs" / "small"
    arms = ("plain", "cached", "recoded", "online")
    for arm in ("plain", "cached", "online"):
        kill_in(arm, work)
        assert not (runs / f"{arm}-s0" / "record.json").exists()
    command = start(work)
    said, _ = command.communicate(timeout=SECONDS)
    assert command.returncode == 0, said
    assert "run   online-s0   begun, goes on" in said
    for arm in ("plain", "cached", "online"):
        assert "Resuming training" in (runs / f"{arm}-s0" / "log.txt").read_text()
    for arm in arms:
        rows = [int(row["epoch"]) for row in results(runs / f"{arm}-s0")]
        assert rows == list(range(1, EPOCHS + 1))
        assert not (runs / f"{arm}-s0" / "state.json").exists()
    check_records({arm: RunRecord.read(runs / f"{arm}-s0" / "record.json") for arm in arms}, work)
    check_what_is_done_again()
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    command = start(work)
    said, _ = command.communicate(timeout=SECONDS)
    assert command.returncode == 0
    assert "nothing is left of 4 runs" in said
    assert "starts" not in said
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before


def standing(*changes: str) -> dict[str, str]:
    """Return how each run stands when the recipe is changed so, by a dry run."""
    words = [word for change in changes for word in ("--set", change)]
    done = CliRunner().invoke(main, ["run", "small.yaml", "--dry-run", "--json", *words])
    assert done.exit_code == 0, done.output
    return {run["arm"]: run["before"] for run in json.loads(done.stdout)["runs"]}


def check_what_is_done_again() -> None:
    """Hold finished runs to be done again when something that decides their result changes, and else not."""
    every = dict.fromkeys(("plain", "cached", "recoded", "online"), "done")
    assert standing() == every
    assert standing("settings.plots=true", "caches.fine.views=9", "arms.recoded.views=3", "jobs=2") == every
    assert standing("settings.lr0=0.5") == dict.fromkeys(every, "changed")
    assert standing("augment={degrees: 5}") == dict.fromkeys(every, "changed")
    assert standing("arms.cached.views=1") == {**every, "cached": "changed"}
    assert standing("caches.coarse.fidelity=small") == {**every, "recoded": "changed"}
    assert standing("caches.fine.seed=1") == {**every, "cached": "changed", "recoded": "changed"}
    shutil.move("kd_cache", "elsewhere")
    assert standing() == every
    shutil.move("elsewhere", "kd_cache")


def check_records(records: dict[str, RunRecord], work: Path) -> None:
    """Hold the records to what the recipe says and what the runs' folders hold."""
    assert {arm: record.mode for arm, record in records.items()} == {
        "plain": "plain", "cached": "cached", "recoded": "cached", "online": "online",
    }  # fmt: skip
    assert {arm: record.cost.teacher_forwards for arm, record in records.items()} == {
        "plain": 0, "cached": 0, "recoded": 0, "online": 12 * EPOCHS,
    }  # fmt: skip
    for record in records.values():
        assert record.judged is not None
        assert (record.judged.weights, record.judged.split) == ("last", "val")
        seconds = [epoch.seconds for epoch in record.epochs]
        assert seconds == sorted(seconds)
        assert record.cost.seconds is not None
        assert record.cost.seconds > seconds[-1]
        assert (record.cost.peak_memory_bytes or 0) > 10**8
    cached, recoded = records["cached"].cache, records["recoded"].cache
    assert cached is not None
    assert recoded is not None
    assert (cached.views, cached.plain_views, cached.teacher_forwards) == (2, 1, 12 * 3)
    assert (recoded.views, recoded.fidelity) == (3, "tiny")
    assert (recoded.bytes_per_view or 0) < (cached.bytes_per_view or 0)
    assert (recoded.extract_seconds or 0) > (cached.extract_seconds or 0)
    assert set(records["cached"].epochs[-1].shares) == {"cwd", "ld"}
    assert records["plain"].cache is None
    assert sorted(path.name for path in (work / "kd_cache").iterdir()) == sorted(
        Path(cache.path).name for cache in (cached, recoded)
    )


def test_a_bad_recipe_is_refused_line_by_line_before_anything_is_written(work: Path) -> None:
    text = (work / "small.yaml").read_text().replace("epochs: 4", "epochs: 0").replace("mode: online", "mode: onlin")
    (work / "small.yaml").write_text(text + "seed: 3\n")
    done = CliRunner().invoke(main, ["run", "small.yaml", "--set", "settings.mosaic=0"])
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    places = ["cache-kd: small.yaml:7: epochs: 0;", "cache-kd: small.yaml:20: arms.online.mode: 'onlin';"]
    places += ["cache-kd: small.yaml:21: seed: no such key;", "cache-kd: --set settings.mosaic=0: settings.mosaic:"]
    assert len(lines) == len(places)
    assert all(line.startswith(place) for line, place in zip(lines, places, strict=True)), lines
    assert not (work / "runs").exists()
    with pytest.raises(RecipeError, match=r"small\.yaml:7: .*; small\.yaml:20: "):
        cache_kd.run_recipe("small.yaml")


def test_a_dry_run_says_what_is_left_and_writes_nothing(work: Path) -> None:
    done = CliRunner().invoke(main, ["run", "small.yaml", "--dry-run", "--json", "--set", "seeds=[0,1]"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [run["run"] for run in found["runs"]] == [
        f"{arm}-s{seed}" for seed in (0, 1) for arm in ("plain", "cached", "recoded", "online")
    ]
    assert {run["before"] for run in found["runs"]} == {"open"}
    fine, coarse = found["caches"]
    assert fine["needed"] and coarse["needed"]
    assert fine["expected_bytes"] > coarse["expected_bytes"] > 0
    assert fine["expected_seconds"] > 0
    assert not (work / "runs").exists()
    assert not (work / "kd_cache").exists()
