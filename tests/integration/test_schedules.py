"""`until`, `warmup`, `cosine` and `balance` in real trainings: what is multiplied, measured, stored, gone on with."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from student_runs import Interrupt, gradients, interrupt_at, results, resume, train_student
from torch import Tensor
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd import train
from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses.cwd import CWD
from cache_kd.student import alarms
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

BATCHES = 3
WEAK = "cwd:weight=0.0005"
STILL = {"optimizer": "SGD", "lr0": 0.0}
"""A student that does not move: the gradients of its terms differ from batch to batch only."""


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The values of every call of CWD."""
    values: list[float] = []
    original = CWD.term

    def term(self: CWD, student: Any, targets: Any) -> Tensor:
        value = original(self, student, targets)
        values.append(float(value.detach()))
        return value

    monkeypatch.setattr(CWD, "term", term)
    return values


def test_a_term_that_is_switched_off_costs_nothing_and_keeps_its_column(
    few_cache: Path,
    tmp_path: Path,
    raw: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(alarms, "CONSTANT_STEPS", 3)
    with caplog.at_level(logging.WARNING, logger="cache_kd"):
        run = train_student(few_cache, tmp_path, "cwd:until=1", "ld", epochs=3)
    assert len(raw) == BATCHES
    rows = results(run.folder)
    assert [float(row["train/cwd_loss"]) > 0 for row in rows] == [True, False, False]
    assert [float(row["train/cwd_loss"]) for row in rows[1:]] == [0.0, 0.0]
    assert all(float(row["train/ld_loss"]) > 0 for row in rows)
    assert [(row["epoch"], row["term"]) for row in gradients(run.folder)] == [
        ("1", "cwd"), ("1", "ld"), ("2", "ld"), ("3", "ld"),
    ]  # fmt: skip
    assert "exactly 0" not in caplog.text


def test_a_run_goes_on_when_its_only_term_is_switched_off(few_cache: Path, tmp_path: Path) -> None:
    run = train_student(few_cache, tmp_path, "cwd:until=1", epochs=2)
    assert [float(row["train/cwd_loss"]) > 0 for row in results(run.folder)] == [True, False]


def test_factors_multiply_what_is_logged_and_what_teaches(few_cache: Path, tmp_path: Path, raw: list[float]) -> None:
    run = train_student(few_cache, tmp_path, "cwd:weight=3,warmup=2,cosine=0.25", epochs=4, close_mosaic=0)
    # A rise of 1/2, 1, 1, 1 times a fall along half a cosine to a quarter.
    factors = [3 * 0.5 * 1, 3 * 0.8125, 3 * 0.4375, 3 * 0.25]
    assert [float(row["weight"]) for row in gradients(run.folder)] == pytest.approx(factors, rel=1e-5)
    means = [sum(raw[start : start + BATCHES]) / BATCHES for start in range(0, len(raw), BATCHES)]
    logged = [float(row["train/cwd_loss"]) for row in results(run.folder)]
    assert logged == pytest.approx([f * mean for f, mean in zip(factors, means, strict=True)], rel=1e-3)


def test_the_gradient_is_that_of_the_factor(few_cache: Path, tmp_path: Path) -> None:
    """A weight of 4 at a quarter of its warm-up teaches as a weight of 1 does."""
    students = [
        train_student(few_cache, tmp_path / str(number), loss, epochs=1).student
        for number, loss in enumerate(("cwd:weight=4,warmup=4", "cwd:weight=1", "cwd:weight=4"))
    ]
    assert all(torch.equal(students[0][name], value) for name, value in students[1].items())
    assert not all(torch.equal(students[0][name], value) for name, value in students[2].items())


# -- balance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (WEAK, STILL),
        pytest.param("mimic:weight=0.001", {"optimizer": "SGD", "lr0": 0.001}, marks=pytest.mark.slow),
    ],
)
def test_a_balance_moves_the_share_to_its_target(
    few_cache: Path, tmp_path: Path, loss: str, settings: dict[str, Any]
) -> None:
    weight = float(loss.partition("=")[2])
    weak = gradients(train_student(few_cache, tmp_path / "weak", loss, epochs=5, **settings).folder)
    held = gradients(train_student(few_cache, tmp_path / "held", loss, epochs=5, balance=0.3, **settings).folder)
    shares = [float(row["share"]) for row in held]
    assert all(float(row["share"]) < 0.05 and float(row["weight"]) == weight for row in weak)
    assert held[0] == weak[0], "the first share is that of the weight as given"
    assert all(0.1 < share < 0.6 for share in shares[-2:])
    assert float(held[-1]["weight"]) > 10 * weight


def test_a_balance_of_a_loss_wins_over_that_of_all(few_cache: Path, tmp_path: Path) -> None:
    losses = ("cwd:weight=1,balance=0.05", "mimic:weight=1")
    run = train_student(few_cache, tmp_path, *losses, epochs=5, balance=0.5, **STILL)
    record = yaml.safe_load((run.folder / "cache_kd.yaml").read_text())
    assert record["losses"] == ["cwd:weight=1.0,balance=0.05", "mimic:weight=1.0,balance=0.5"]
    last = {row["term"]: float(row["share"]) for row in gradients(run.folder)}
    assert 0.01 < last["cwd"] < 0.2 and 0.3 < last["mimic"] < 0.7


def test_gains_are_kept_and_gone_on_with(few_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupt, match="cache-kd train resume="):
        train_student(few_cache, tmp_path, WEAK, epochs=4, balance=0.3, before_batch=interrupt_at(2, 1), **STILL)
    folder = tmp_path / "train"
    held = torch.load(folder / "weights" / "kd_last.pt", weights_only=True)["state"]["_extra_state"]
    assert held["steps"] == 2 * BATCHES and held["gains"]["cwd"] > 10
    first: list[tuple[float, int]] = []

    def look(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        distiller = unwrap_model(trainer.model).kd
        first.append((distiller.weights["cwd"], distiller.get_extra_state()["steps"]))

    again = Path(shutil.copytree(folder, tmp_path / "again" / "train"))
    with pytest.raises(MismatchError, match=r"not with --balance 0\.5; leave --balance out to go on"):
        resume(again, balance=0.5)
    run = resume(again, balance=0.3, before_batch=look)
    assert first[0] == (pytest.approx(0.0005 * held["gains"]["cwd"]), 2 * BATCHES)
    assert first[-1][1] == 4 * BATCHES - 1
    shares = [float(row["share"]) for row in gradients(run.folder)]
    assert len(shares) == 4 and all(0.1 < share < 0.6 for share in shares[-2:])


def test_the_interface_of_python_takes_a_balance(few_cache: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"project": str(tmp_path), "epochs": 1, "batch": 4, "val": False, "plots": False}
    done = train("yolov8n.yaml", cache=few_cache, losses=["cwd"], balance=0.2, device="cpu", **settings)
    assert [spec.balance for spec in done.losses] == [0.2]
    with pytest.raises(SettingError, match=r"--balance 2; allowed: finite numbers from 0 to 0\.9"):
        train("yolov8n.yaml", cache=few_cache, losses=["cwd"], balance=2.0, **settings)
