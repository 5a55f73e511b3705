"""Runs of a recipe: what is done is skipped, several go at once, one that fails or a signal leaves the rest whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from recipe_runs import Quick, plan, planned, task, write_record

from cache_kd.errors import CacheKDError
from cache_kd.pipeline.recipes import execution
from cache_kd.pipeline.recipes.execution import run_plan
from cache_kd.pipeline.recipes.plan import (
    CHANGED,
    DONE,
    ELSEWHERE,
    OPEN,
    RESUME,
    RunTask,
    expected,
    found_elsewhere,
    run_status,
)
from cache_kd.pipeline.recipes.results import plan_lines
from cache_kd.report.record import FILE, STATE, RunRecord


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the recipe's runs; time does not pass."""
    monkeypatch.setattr(execution, "POLL_SECONDS", 0.0)
    return tmp_path / "runs" / "mine"


def quiet(_: str) -> None:
    """Take a line."""


def test_open_runs_are_done_in_their_order_and_done_ones_are_not_started(folder: Path) -> None:
    runs = [planned(folder, arm, seed, DONE if arm == "b" else OPEN) for seed in (0, 1) for arm in "abc"]
    for run in runs:
        if run.status == DONE:
            write_record(run.task, points=0.25)
    start = Quick()
    result = run_plan(plan(folder, *runs), jobs=1, say=quiet, start=start)
    assert start.names == ["a-s0", "c-s0", "a-s1", "c-s1"]
    assert start.at_once == 1
    assert result.ok
    assert [record.judged.map50_95 for record in result.records if record.judged] == [0.5, 0.25, 0.5] * 2


@pytest.mark.parametrize("jobs", [2, 3])
def test_several_runs_go_at_once_with_the_cores_divided(folder: Path, jobs: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(execution, "cpu_threads", lambda: 12)
    start = Quick()
    run_plan(plan(folder, *(planned(folder, "a", seed) for seed in range(5))), jobs=jobs, say=quiet, start=start)
    assert start.at_once == jobs
    assert {run.threads for run in start.started} == {12 // jobs}


@pytest.mark.parametrize(("cores", "gpus", "expected_jobs"), [(1, 0, 1), (2, 0, 1), (9, 0, 4), (9, 3, 3)])
def test_one_run_a_gpu_else_half_the_cores(cores: int, gpus: int, expected_jobs: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(execution, "cpu_threads", lambda: cores)
    monkeypatch.setattr(execution.torch.cuda, "device_count", lambda: gpus)
    assert execution.default_jobs() == expected_jobs


def test_gpus_are_shared_out(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(execution.torch.cuda, "device_count", lambda: 2)
    seen: list[int | None] = []
    quick = Quick()

    def start(run: RunTask, gpu: int | None) -> Any:
        seen.append(gpu)
        return quick(run, gpu)

    runs = [planned(folder, "a", seed) for seed in range(3)]
    pinned = planned(folder, "b", settings={"epochs": 2, "batch": 4, "device": "cpu"})
    run_plan(plan(folder, *runs, pinned), jobs=4, say=quiet, start=start)
    assert sorted(seen[:3], key=str) == [0, 0, 1]
    assert seen[3] is None


def test_a_run_that_fails_does_not_end_the_others_and_says_why(folder: Path) -> None:
    (folder / "a-s0").mkdir(parents=True)
    (folder / "a-s0" / "error.txt").write_text("it broke\n")
    said: list[str] = []
    start = Quick(codes={"a-s0": 1, "a-s1": -9})
    result = run_plan(plan(folder, *(planned(folder, "a", seed) for seed in range(3))), say=said.append, start=start)
    assert not result.ok
    errors = [run.error for run in result.finished]
    assert errors[0] is not None and errors[0].startswith("it broke (log: ")
    assert errors[1] is not None and errors[1].startswith("ended by signal 9")
    assert errors[2] is None
    assert len(result.records) == 1
    assert any(line.startswith("[1/3] a-s0: failed: it broke") for line in said)


def test_an_interrupt_ends_all_runs_and_says_how_to_go_on(folder: Path) -> None:
    start = Quick(interrupt_after=1, polls=99)
    with pytest.raises(KeyboardInterrupt, match=r"^\nwhole epochs and views stay, go on: cache-kd run r\.yaml$"):
        run_plan(plan(folder, *(planned(folder, "a", seed) for seed in range(3))), jobs=2, say=quiet, start=start)
    assert sorted(start.stopped) == ["a-s0", "a-s1"]


def test_two_processes_do_not_run_one_recipe(folder: Path) -> None:
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(CacheKDError, match="another process runs this recipe"):
        run_plan(plan(folder, planned(folder)), say=quiet, start=Quick())


def test_a_run_is_done_by_its_fingerprint_alone(folder: Path) -> None:
    one = task(folder)
    assert run_status(one) == OPEN
    Path(one.folder).mkdir(parents=True)
    (Path(one.folder) / STATE).write_text(json.dumps({"fingerprint": one.fingerprint}))
    assert run_status(one) == RESUME
    assert run_status(task(folder, fingerprint="other")) == CHANGED
    write_record(one)
    assert run_status(one) == DONE
    assert run_status(task(folder, fingerprint="other")) == CHANGED
    (Path(one.folder) / FILE).write_text("{")
    (Path(one.folder) / STATE).unlink()
    assert run_status(one) == OPEN


def test_a_finished_run_of_other_settings_is_kept_aside(folder: Path) -> None:
    old = task(folder, fingerprint="0123456789")
    write_record(old)
    new = planned(folder, status=CHANGED)
    run_plan(plan(folder, new), say=quiet, start=Quick())
    assert RunRecord.read(Path(new.task.folder) / FILE).fingerprint == new.task.fingerprint
    (kept,) = (folder.parents[0] / "replaced").rglob(FILE)
    assert RunRecord.read(kept).fingerprint == "0123456789"
    assert kept.parent.name == "plain-s0-01234567"


@pytest.mark.parametrize("held", [OPEN, RESUME, CHANGED])
def test_a_run_that_another_recipe_did_is_copied_and_not_trained(folder: Path, held: str) -> None:
    other = task(folder.parent / "other", "theirs", fingerprint="same")
    write_record(other, points=0.75)
    Path(other.folder, "weights").mkdir()
    Path(other.folder, "weights", "last.pt").write_text("weights")
    mine = planned(folder, "mine", fingerprint="same", status=held)
    if held == RESUME:
        Path(mine.task.folder, "weights").mkdir(parents=True)
        Path(mine.task.folder, STATE).write_text("{}")
    elif held == CHANGED:
        write_record(task(folder, "mine", fingerprint="0123456789"))
    runs = found_elsewhere([mine, planned(folder, "new", fingerprint="new")], folder)
    assert [run.status for run in runs] == [ELSEWHERE, OPEN]
    assert plan_lines(plan(folder, *runs), 1)[1:] == [
        "  run   mine-s0  done in other/theirs-s0, is copied",
        "  run   new-s0   to do",
        "1 of 2 runs left, 1 at once, time unknown until the first run is done",
    ]
    start = Quick()
    result = run_plan(plan(folder, *runs), say=quiet, start=start)
    assert start.names == ["new-s0"]
    copied = result.records[0]
    assert (copied.recipe, copied.arm, copied.judged and copied.judged.map50_95) == (folder.name, "mine", 0.75)
    assert sorted(path.name for path in Path(mine.task.folder).iterdir()) == [FILE, "weights"]
    assert Path(mine.task.folder, "weights", "last.pt").read_text() == "weights"
    assert run_status(mine.task) == DONE
    assert RunRecord.read(Path(other.folder) / FILE).recipe == "other"
    assert len(list((folder.parent / "replaced").rglob(FILE))) == (held == CHANGED)


def test_arms_that_exchanged_their_names_exchange_their_runs(folder: Path) -> None:
    for arm, points in (("a", 0.25), ("b", 0.75)):
        write_record(task(folder, arm, fingerprint=f"was {arm}"), points=points)
        Path(folder, f"{arm}-s0", "log.txt").write_text(arm)
    turned = [planned(folder, "b", fingerprint="was a"), planned(folder, "a", fingerprint="was b")]
    result = run_plan(plan(folder, *found_elsewhere(turned, folder)), say=quiet, start=Quick())
    assert [record.judged and record.judged.map50_95 for record in result.records] == [0.25, 0.75]
    assert Path(folder, "b-s0", "log.txt").read_text() == "a"
    assert Path(folder, "a-s0", "log.txt").read_text() == "b"


def test_the_remains_of_an_unfinished_run_of_other_settings_go(folder: Path) -> None:
    new = planned(folder, status=CHANGED)
    Path(new.task.folder, "weights").mkdir(parents=True)
    run_plan(plan(folder, new), say=quiet, start=Quick())
    assert not Path(new.task.folder, "weights").exists()


def test_seconds_are_expected_from_runs_of_the_arm_else_from_those_alike(folder: Path) -> None:
    write_record(task(folder, "a"), seconds=10)
    write_record(task(folder, "b"), seconds=30)
    write_record(task(folder.parent / "other", "z", mode="online"), seconds=50)
    longer = {"epochs": 6, "batch": 4}
    runs = [
        planned(folder, "a", 1),
        planned(folder, "c", settings=longer),
        planned(folder, "o", mode="online"),
        planned(folder, "s", student="yolov8s.yaml"),
        planned(folder, "i", imgsz=96),
    ]
    assert [run.seconds for run in expected(runs, folder)] == [10, 60, 50, None, None]


def test_the_plan_says_what_is_left(folder: Path) -> None:
    write_record(task(folder, "a"))
    runs = [planned(folder, "a", 0, DONE), planned(folder, "a", 1, RESUME), planned(folder, "a", 2)]
    lines = plan_lines(plan(folder, *expected(runs, folder)), 2)
    assert lines[1:4] == [
        "  run   a-s0  done",
        "  run   a-s1  begun, goes on, about 10.0 s",
        "  run   a-s2  to do, about 10.0 s",
    ]
    assert lines[4] == "2 of 3 runs left, 2 at once, about 10.0 s"
    write_record(runs[1].task)
    assert plan_lines(plan(folder, planned(folder, "a", 0, DONE)), 1)[-1] == "nothing is left of 1 runs"


def test_a_task_is_what_its_line_says(folder: Path) -> None:
    one = task(folder, losses=("cwd:weight=5",), imports=("mine.py",), views=3)
    assert RunTask.from_json(one.to_json()) == one
