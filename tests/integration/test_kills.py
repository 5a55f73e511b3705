"""Killed at random moments, every command is gone on with by typing it again, to the same result."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from kill_commands import COMMAND, content, differing_files, finish, kill_after, popen, state, tell
from small_inputs import IMAGES
from student_runs import (
    FAST,
    Interrupt,
    differing,
    distiller_tensors,
    flat,
    gradients,
    interrupt_at,
    results,
    resume,
)
from torch import Tensor

from cache_kd.structures import View
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

LOSSES = ("cwd", "ld")
RUN = Path("runs", "detect", "train")
RESUMABLE = ("writing checkpoints", "between the tables and the checkpoint", "in an epoch")
EPOCHS = 5
VIEWS = [View("mixed", 0), View("mixed", 1), View("mixed", 0), View("mixed", 1), View("plain", 0)]


# -- extract and top-up ---------------------------------------------------------------------------------------------


def check_forked(teacher: Path, data: Path, folder: Path, count: int, seed: int) -> None:
    """Kill `count` forked extractions and compare what they became with one that was left alone."""
    script = Path(__file__).with_name("kill_randomly.py")
    done = subprocess.run(
        [sys.executable, str(script), str(teacher), str(data), str(folder), str(count), str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout.splitlines()[-1])["trials"]
    assert [trial for trial in trials if not trial["equal digest"] or trial["different"]] == []
    trials = [trial for trial in trials if trial["phase"] != "ended"]
    tell("forked extractions killed", (trial["phase"] for trial in trials))
    tell("of these", ("topping up" if trial["stage"] else "extracting" for trial in trials))
    assert len(trials) == count


def test_extractions_killed_at_random_moments_end_as_one_undisturbed(
    teacher: Path, data_file: Path, tmp_path: Path
) -> None:
    check_forked(teacher, data_file, tmp_path, 5, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_170_extractions_killed_at_random_moments_end_as_one_undisturbed(
    teacher: Path, data_file: Path, tmp_path: Path
) -> None:
    check_forked(teacher, data_file, tmp_path, 170, seed=5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_30_real_commands_killed_at_random_moments_end_as_one_undisturbed(
    teacher: Path, data_file: Path, tmp_path: Path
) -> None:
    log, generator = tmp_path / "log.txt", random.Random(6)
    fixed = ["extract", "--teacher", str(teacher), "--data", str(data_file), "--imgsz=64", "--batch=2"]
    stages = [
        [*fixed, "--device=cpu", "--workers=0", "--views=1", "--plain-views=0"],
        [*fixed, "--device=cpu", "--workers=0", "--views=2", "--plain-views=1"],
    ]
    reference = tmp_path / "whole"
    seconds = [finish([*stage, "--cache", str(reference)], log) for stage in stages]
    first, whole = tmp_path / "first", content(reference)
    finish([*stages[0], "--cache", str(first)], log)
    seen: list[str] = []
    pace = 1.0  # a machine that others use too is faster at one time and slower at another
    while len(seen) < 30:
        path, moment = tmp_path / "killed", generator.uniform(0, sum(seconds))
        stage = int(moment > seconds[0])
        if stage:
            shutil.copytree(first, path)
        killed = kill_after([*stages[stage], "--cache", str(path)], pace * (moment - stage * seconds[0]), log)
        pace *= 1.03 if killed else 0.8
        found = f"{('extracting', 'topping up')[stage]}, {state(path)}"
        for arguments in stages[stage:]:
            finish([*arguments, "--cache", str(path)], log)
        assert differing_files(content(path), whole) == [], found
        shutil.rmtree(path)
        if killed:
            seen.append(found)
    tell("real extractions killed", seen)


# -- train ----------------------------------------------------------------------------------------------------------


def look_at_resume(folder: Path, epochs: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Resume the killed run in `folder` to its end, looking at the first batch; return its student and adapters."""
    weights = folder / "weights"
    done = int(torch.load(weights / "last.pt", weights_only=False)["epoch"]) + 1
    held = [torch.load(file, weights_only=True) for file in weights.glob("kd_last.pt*") if is_whole(file)]
    right = next(content for content in held if content["epoch"] == done - 1)
    first: list[dict[str, Tensor]] = []

    def keep(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        if not first:
            first.append(distiller_tensors(trainer))

    torch.manual_seed(done)  # what a process drew before it resumes is nothing to the run
    run = resume(folder, before_batch=keep, workers=0)
    assert differing(first[0], flat(right["state"])) == []
    shown = list(dict.fromkeys(run.shown))
    assert shown == [(epoch, VIEWS[epoch]) for epoch in range(done, epochs)]
    assert [row["epoch"] for row in results(folder)] == [str(epoch + 1) for epoch in range(epochs)]
    rows = [(row["epoch"], row["term"]) for row in gradients(folder)]
    assert rows == [(str(epoch + 1), name) for epoch in range(epochs) for name in LOSSES]
    assert sorted(file.name for file in weights.iterdir()) == ["best.pt", "kd_last.pt", "last.pt"]
    return run.student, run.adapters


def is_whole(file: Path) -> bool:
    try:
        torch.load(file, weights_only=True)
    except Exception:  # torch raises many kinds for a torn file
        return False
    return True


def phase_of(folder: Path) -> str:
    """Say by its files how far a killed run is."""
    weights = folder / "weights"
    if not (weights / "last.pt").exists():
        return "before the first checkpoint"
    epoch = torch.load(weights / "last.pt", weights_only=False)["epoch"]
    if epoch in (-1, EPOCHS - 1):
        return "after the last epoch"
    if list(weights.glob("*.next")) or list(weights.glob(".tmp-*")):
        return "writing checkpoints"
    if len(results(folder)) > epoch + 1:
        return "between the tables and the checkpoint"
    return "in an epoch"


def wait_for_rows(process: subprocess.Popen[bytes], run: Path, count: int) -> float:
    """Wait until a training has noted so many epochs, or ended; return the moment."""
    table = run / "results.csv"
    while process.poll() is None and (not table.exists() or len(table.read_bytes().splitlines()) <= count):
        time.sleep(0.002)
    return time.monotonic()


def kill_trainings(cache: Path, folder: Path, count: int, seed: int) -> None:
    settings = [f"{key}={value}" for key, value in {**FAST, "epochs": EPOCHS, "workers": 0}.items()]
    words = [word for name in LOSSES for word in ("--loss", name)]
    arguments = ["train", "--student", "yolov8n.yaml", "--cache", str(cache), "--threads=1", *words, *settings]
    log, generator, seen = folder / "log.txt", random.Random(seed), []
    (folder / "whole").mkdir()
    process, place = popen(arguments, log, folder / "whole"), folder / "killed"
    first = wait_for_rows(process, folder / "whole" / RUN, 1)
    seconds = (wait_for_rows(process, folder / "whole" / RUN, EPOCHS) - first) / (EPOCHS - 1)
    assert process.wait(timeout=300) == 0, log.read_text()[-2000:]
    while len(seen) < count:
        place.mkdir()
        process = popen(arguments, log, place)
        wait_for_rows(process, place / RUN, generator.randrange(1, EPOCHS))
        time.sleep(generator.uniform(0, seconds))
        os.killpg(process.pid, signal.SIGKILL)
        phase = phase_of(place / RUN)
        if process.wait() == -signal.SIGKILL and phase in RESUMABLE:
            seen.append(phase)
            second = Path(shutil.copytree(place, folder / "second"))
            ours, theirs = look_at_resume(place / RUN, EPOCHS), look_at_resume(second / RUN, EPOCHS)
            assert differing(ours[0], theirs[0]) == [] and differing(ours[1], theirs[1]) == []
            shutil.rmtree(second)
        shutil.rmtree(place)
    tell("trainings killed and resumed twice", seen)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20_trainings_killed_at_random_moments_are_resumed(few_cache: Path, tmp_path: Path) -> None:
    kill_trainings(few_cache, tmp_path, 20, seed=8)


# -- signals that can be answered -----------------------------------------------------------------------------------


def stop_when(condition: Any, process: subprocess.Popen[bytes], number: int, *, group: bool) -> int:
    """Send a signal as soon as `condition` holds, to the process alone or to its group; return the exit code."""
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if group else os.kill)(process.pid, number)
    code = process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == [], "orphans"
    return code


CASES = [
    (signal.SIGTERM, False, 2, 143, "terminated"),
    pytest.param(signal.SIGINT, True, 0, 130, "interrupted", marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, True, 2, 130, "interrupted", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, False, 0, 143, "terminated", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, True, 2, 143, "terminated", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("number", "group", "workers", "code", "word"), CASES)
def test_a_stopped_extraction_says_one_line_and_is_gone_on_with(
    teacher: Path, data_file: Path, tmp_path: Path, number: int, group: bool, workers: int, code: int, word: str
) -> None:
    path, log = tmp_path / "cache", tmp_path / "log.txt"
    fixed = ["extract", "--teacher", str(teacher), "--data", str(data_file), "--imgsz=64", "--batch=2", "--device=cpu"]
    process = subprocess.Popen(
        [*COMMAND, *fixed, "--views=300", f"--workers={workers}", "--cache", str(path)],
        stdout=subprocess.DEVNULL, stderr=log.open("wb"), start_new_session=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore:This DataLoader will create"},  # torch's, where there is one core
    )  # fmt: skip
    found = stop_when(lambda: len(list(path.glob("units/*.json"))) >= 2, process, number, group=group)
    assert log.read_text().splitlines() == [
        f"cache-kd: {word}; what is committed stays, run the same command again to go on"
    ]
    assert found == code
    assert not list(path.rglob(".tmp-*")) and not (path / ".writer.json").exists()
    units = len(list(path.glob("units/*.json")))
    assert units >= 2
    done = subprocess.run(
        [*COMMAND, *fixed, f"--views={units + 1}", "--plain-views=0", "--cache", str(path), "--json"],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["items_extracted"] == IMAGES, "only the view after the last committed one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_extraction_stopped_in_its_forecast_leaves_no_folder(
    teacher: Path, data_file: Path, tmp_path: Path, number: int, code: int, word: str
) -> None:
    path, log = tmp_path / "made" / "cache", tmp_path / "log.txt"
    fixed = ["extract", "--teacher", str(teacher), "--data", str(data_file), "--imgsz=64", "--batch=2", "--device=cpu"]
    process = subprocess.Popen(
        [*COMMAND, *fixed, "--workers=0", "--cache", str(path)],
        stdout=subprocess.DEVNULL, stderr=log.open("wb"), start_new_session=True,
    )  # fmt: skip
    # The teacher's arrays are the last thing that is written before the forecast.
    assert stop_when(lambda: len(list(path.glob("teacher/*/zarr.json"))) >= 3, process, number, group=True) == code
    assert len(log.read_text().splitlines()) == 1 and word in log.read_text()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("number", "workers", "code", "word"),
    [
        (signal.SIGTERM, 2, 143, "terminated"),
        pytest.param(signal.SIGINT, 0, 130, "interrupted", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, 130, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_training_says_how_to_go_on(
    few_cache: Path, tmp_path: Path, number: int, workers: int, code: int, word: str
) -> None:
    settings = [f"{key}={value}" for key, value in {**FAST, "epochs": 60, "workers": workers}.items()]
    log, last = tmp_path / "log.txt", tmp_path / "runs" / "detect" / "train" / "weights" / "last.pt"
    process = popen(
        ["train", "--student", "yolov8n.yaml", "--cache", str(few_cache), "--loss", "cwd", *settings], log, tmp_path
    )
    assert stop_when(last.exists, process, number, group=True) == code
    said = log.read_text(errors="replace")
    assert "Traceback" not in said and "Exception ignored" not in said
    assert said.splitlines()[-1] == (
        f"cache-kd: {word}; go on after the last whole epoch: cache-kd train resume={last}"
    )
    with pytest.raises(Interrupt, match="cache-kd train resume="):
        resume(last.parents[1], before_batch=interrupt_at(2, 0))
