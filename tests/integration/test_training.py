"""A student learns from a cache inside the stock trainer, and nothing but its loss is changed by that."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from student_runs import Run, differing, results, train_student
from torch import Tensor
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.errors import AlarmError, MismatchError
from cache_kd.losses import LOSSES
from cache_kd.losses.cwd import CWD
from cache_kd.structures import View
from cache_kd.student import alarms
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

STUDENT_TENSORS = 355


@pytest.fixture(scope="module")
def plain(few_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs on the cache's views without any distillation."""
    return train_student(few_cache, tmp_path_factory.mktemp("plain"), "none")


def test_weight_zero_leaves_every_tensor_of_the_student_as_a_plain_run_does(
    plain: Run, few_cache: Path, tmp_path: Path
) -> None:
    """Whatever the losses draw, whatever critics they train: the student's random numbers and steps stay its own."""
    silent = train_student(few_cache, tmp_path, *(f"{name}:weight=0" for name in LOSSES))
    assert len(silent.student) == 2 * STUDENT_TENSORS
    assert differing(silent.student, plain.student) == []
    assert silent.shown == plain.shown


def test_a_weight_teaches_the_student(plain: Run, few_cache: Path, tmp_path: Path) -> None:
    taught = train_student(few_cache, tmp_path, "cwd", "ld")
    assert len(differing(taught.student, plain.student)) > STUDENT_TENSORS


def test_epochs_show_mixed_views_in_turn_and_plain_ones_at_the_end(plain: Run) -> None:
    assert plain.shown == [(0, View("mixed", 0))] * 3 + [(1, View("plain", 0))] * 3


def test_two_workers_train_the_same_student(few_cache: Path, tmp_path: Path) -> None:
    alone = train_student(few_cache, tmp_path, "cwd", "bckd")
    helped = train_student(few_cache, tmp_path, "cwd", "bckd", workers=2)
    assert alone.trainer.train_loader.num_workers == 0
    assert helped.trainer.train_loader.num_workers > 0
    assert differing(helped.student, alone.student) == []
    assert differing(helped.adapters, alone.adapters) == []


@pytest.mark.parametrize(
    ("student", "losses"),
    [
        ("yolov8s.yaml", ("cwd", "ld")),
        ("yolo11n.yaml", ("mimic", "ld")),
        ("yolo12n.yaml", ("cwd", "kd")),
        ("yolo26n.yaml", ("sl2", "bckd")),
    ],
)
def test_other_scales_and_families_learn(
    few_cache: Path, tmp_path: Path, student: str, losses: tuple[str, ...]
) -> None:
    run = train_student(few_cache, tmp_path, *losses, student=student, epochs=1, close_mosaic=0)
    (row,) = results(run.folder)
    assert all(float(row[f"train/{name}_loss"]) > 0 for name in losses)


def test_a_modified_model_learns_wherever_its_head_stands(few_cache: Path, tmp_path: Path) -> None:
    content = yaml_model_load("yolov8n.yaml")
    *_, detect = content["head"]
    content["head"] = [*content["head"][:-1], [-1, 1, "Conv", [640, 3, 1]], [[15, 18, 22], *detect[1:]]]
    for key in ("yaml_file", "scale"):
        content.pop(key)
    content["scales"] = {"n": content["scales"]["n"]}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    run = train_student(few_cache, tmp_path, "cwd", "ld", student=str(file), epochs=1, close_mosaic=0)
    assert len(unwrap_model(run.trainer.model).model) == 24
    adapters = run.adapters
    assert [value.shape[1] for value in adapters.values() if value.ndim == 4] == [64, 128, 160]


def test_a_student_with_a_frozen_neck_learns_with_its_head(few_cache: Path, tmp_path: Path) -> None:
    run = train_student(few_cache, tmp_path, "cwd", "ld", epochs=1, freeze=22)
    (row,) = results(run.folder)
    assert float(row["train/ld_loss"]) > 0
    assert not (run.folder / "kd_gradients.csv").exists()


def test_a_student_may_start_from_a_checkpoint(plain: Run, few_cache: Path, tmp_path: Path) -> None:
    first: list[Tensor] = []

    def keep(trainer: DistillTrainer, batch: dict[str, Any]) -> None:
        first.append(unwrap_model(trainer.model).model[0].conv.weight.detach().clone())

    train_student(few_cache, tmp_path, "cwd", student=str(plain.trainer.last), epochs=1, before_batch=keep)
    stored = torch.load(plain.trainer.last, weights_only=False)["model"].model[0].conv.weight.float()
    assert torch.equal(first[0], stored)


def test_training_needs_neither_the_teachers_file_nor_its_module(few_cache: Path, tmp_path: Path) -> None:
    assert not list(few_cache.parent.glob("*.pt"))
    script = (
        "import sys\n"
        "for gone in ('cache_kd.ultralytics_bridge.teacher', 'cache_kd.teacher', 'cache_kd.pipeline.extraction'):\n"
        "    sys.modules[gone] = None\n"
        "from cache_kd.cli import main\n"
        "main()\n"
    )
    words = ["train", "--student", "yolov8n.yaml", "--cache", str(few_cache), "--loss", "cwd", "--loss", "ld"]
    settings = ["epochs=1", "batch=4", "val=False", "plots=False", "device=cpu"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words, *settings], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/detect/train/weights/best.pt").is_file()


def changed_names(data_file: Path, folder: Path, names: list[str]) -> Path:
    """Write a data file for the same images under other class names."""
    file = folder / "renamed.yaml"
    content = {"path": str(data_file.parent), "train": "images/train", "val": "images/val", "names": names}
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("settings", [{}, {"cls_remap": False}])
def test_classes_are_matched_by_the_names_of_the_students_data_set(
    few_cache: Path, few_images: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    names = list(yaml.safe_load(few_images.read_text())["names"].values())
    permuted = changed_names(few_images, tmp_path, [names[2], names[0], names[1]])
    run = train_student(few_cache, tmp_path, "kd", data=permuted, epochs=1, **settings)
    assert unwrap_model(run.trainer.model).kd.class_map == (2, 0, 1)
    same = train_student(few_cache, tmp_path, "kd", epochs=1, **settings)
    assert unwrap_model(same.trainer.model).kd.class_map is None


def test_unknown_classes_are_refused_for_logits_and_allowed_for_features(
    few_cache: Path, few_images: Path, tmp_path: Path
) -> None:
    unknown = changed_names(few_images, tmp_path, ["RBC", "cat", "dog"])
    with pytest.raises(MismatchError, match=r"does not know the classes cat, dog, which kd would need"):
        train_student(few_cache, tmp_path / "runs", "cwd", "kd", data=unknown)
    assert not (tmp_path / "runs").exists()
    train_student(few_cache, tmp_path / "runs", "cwd", data=unknown, epochs=1)


def test_a_term_that_is_not_finite_ends_the_run(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CWD, "term", lambda self, student, targets: student.features[0].sum() * float("nan"))
    with pytest.raises(AlarmError, match="distillation term cwd is nan although the student's outputs are finite"):
        train_student(few_cache, tmp_path, "cwd")


def test_a_term_that_never_changes_ends_the_run(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "CONSTANT_STEPS", 5)
    monkeypatch.setattr(CWD, "term", lambda self, student, targets: student.features[0].sum() * 0 + 7)
    with pytest.raises(AlarmError, match=r"cwd has been 7\.0 for 5 steps"):
        train_student(few_cache, tmp_path, "cwd")


def test_a_term_of_zero_is_warned_of(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CWD, "term", lambda self, student, targets: student.features[0].sum() * 0)
    with caplog.at_level(logging.WARNING, logger="cache_kd"):
        train_student(few_cache, tmp_path, "cwd", epochs=1)
    assert "cwd: the raw distillation term is exactly 0" in caplog.text


def test_every_batch_is_watched_where_several_make_one_step(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def second_is_nan(self: CWD, student: Any, targets: Any) -> Tensor:
        calls.append(len(calls))
        value = student.features[0].square().mean()
        return value * float("nan") if len(calls) == 2 else value

    monkeypatch.setattr(CWD, "term", second_is_nan)
    with pytest.raises(AlarmError, match="distillation term cwd is nan"):
        train_student(few_cache, tmp_path, "cwd", nbs=12)
