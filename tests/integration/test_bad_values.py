"""NaN, infinities and values beyond what can be stored end in one line that says what and where; the rest stays."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import refusals
import torch
from refusals import SMALL, Refused, run
from small_inputs import build_model, save_model
from student_runs import train_student
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.errors import AlarmError
from cache_kd.losses import LOSSES
from cache_kd.ultralytics_bridge.teacher import Teacher
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

work, refused = refusals.work, refusals.refused
QUICK = ["epochs=2", "batch=4", "nbs=4", "val=False", "plots=False", "device=cpu"]
FILE = """
from cache_kd.losses import LOSSES
from cache_kd.losses.maps import MapLoss

class Bad(MapLoss):
    name, title, paper, default_weight, cost = "bad", "nothing", "None, 2026", 1.0, "none"

    def __init__(self, teacher, student, *, layers: tuple[str, ...] = (), value: str = "nan"):
        super().__init__(teacher, student, layers=layers, value=value)
        self.value = float(value)

    def term(self, student, targets):
        return student.features[0].sum() * 0 + self.value

LOSSES["bad"] = Bad
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that loads quickly."""
    return save_model(build_model("yolov8n.yaml"), tmp_path_factory.mktemp("teacher") / "best.pt", imgsz=64)


@pytest.fixture
def loud(tmp_path: Path) -> Path:
    """A teacher whose features are finite and beyond half precision."""
    model = build_model("yolov8n.yaml")
    model.model[15].cv2.bn.bias.data.fill_(60_000.0)
    model.model[15].cv2.bn.weight.data.fill_(20_000.0)
    return save_model(model, tmp_path / "loud.pt", imgsz=64)


def test_features_beyond_half_precision_are_refused_at_exact(refused: Refused, loud: Path, few_images: Path) -> None:
    line = refused("extract", "--teacher", loud, "--data", few_images, *SMALL, "--fidelity", "exact")
    assert re.search(r"view mixed-0000, item \d+ \(BloodImage_\d+\.jpg\): features of P3: ", line)
    assert "beyond ±65504" in line and "--fidelity safe" in line


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_leaves_what_is_committed(
    teacher: Path, few_images: Path, work: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    words = ["extract", "--teacher", teacher, "--data", few_images, *SMALL, "--views", "2", "--cache"]
    assert run(*words, "whole").exit_code == 0
    stock, calls = Teacher.__call__, 0

    def faulty(self: Teacher, views: list[Any], *, batch: int) -> Any:
        nonlocal calls
        calls += 1
        said = stock(self, views, batch=batch)
        if calls == 2 + 3 + 2:  # after those of the forecast and of the first view: its batch holds items 4 to 7
            said[1].features[1][0, 0, 0] = value
        return said

    with monkeypatch.context() as patched:
        patched.setattr(Teacher, "__call__", faulty)
        done = run(*words, "cache")
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 1 and "view mixed-0001, item 5 (" in line and "features of P4: 1 of 2048 values" in line
    assert "are not finite; check the teacher: yolo val" in line and "what is committed stays" in line
    assert len(list((work / "cache" / "units").rglob("*.json"))) == 1
    assert run(*words, "cache").exit_code == 0
    digests = {json.loads((work / name / "manifest.json").read_text())["digest"] for name in ("cache", "whole")}
    assert len(digests) == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite(
    few_cache: Path, tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "bad", None)  # so that it is taken out again
    (tmp_path / "mine.py").write_text(FILE)
    words = ["--import", tmp_path / "mine.py", "--loss", f"bad:value={value}", "--loss", "cwd"]
    done = run("train", "--student", "yolov8n.yaml", "--cache", few_cache, *words, *QUICK)
    line = done.stderr.splitlines()[-1]
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert f"distillation term bad is {value} although the student's outputs are finite" in line
    assert "(epoch 1, view plain-0000, " in line
    assert "images Blood" in line and f"cache-kd verify {few_cache}" in line


def test_a_loss_of_zero_is_loudly_warned_of(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOSSES, "bad", None)
    (tmp_path / "mine.py").write_text(FILE)
    words = ["--import", tmp_path / "mine.py", "--loss", "bad:value=0"]
    done = run("train", "--student", "yolov8n.yaml", "--cache", few_cache, *words, *QUICK)
    assert done.exit_code == 0, done.exception
    assert "bad: the raw distillation term is exactly 0, nothing is learnt from it" in caplog.text


def test_an_adapter_that_is_not_finite_is_named(few_cache: Path, tmp_path: Path) -> None:
    def spoil(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        next(iter(unwrap_model(trainer.model).kd.adapters())).data.fill_(math.nan)

    with pytest.raises(AlarmError, match=r"term mimic is nan .*epoch 1, view mixed-0000.* weights, \S+ is not finite"):
        train_student(few_cache, tmp_path, "mimic", before_batch=spoil)


@pytest.mark.slow
def test_a_student_that_stays_not_finite_ends_in_one_line(few_cache: Path, tmp_path: Path) -> None:
    def spoil(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        if trainer.epoch:
            unwrap_model(trainer.model).model[0].conv.weight.data.fill_(math.nan)

    with pytest.raises(AlarmError, match=r"loss is not finite in epoch 2: .* persisted .*lower lr0"):
        train_student(few_cache, tmp_path, "cwd", before_batch=spoil)
    saved = torch.load(next(tmp_path.rglob("last.pt")), weights_only=False)
    assert all(value.isfinite().all() for value in saved["ema"].state_dict().values())
