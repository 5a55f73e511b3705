"""All losses in one training, and each alone: columns, shares of the gradient, trained adapters, what is recorded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from student_runs import Run, distiller_tensors, gradients, results, train_student
from torch import Tensor
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.losses import LOSSES, parse_loss
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

SIGNED = {"ho"}
"""Terms that may be negative: what a critic thinks."""
LAYERS = "C3,C4,8:8"


@pytest.fixture(scope="module")
def begun() -> list[dict[str, Tensor]]:
    """The distiller of `together` before its first step."""
    return []


@pytest.fixture(scope="module")
def together(full_cache: Path, begun: list[dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs with all losses at their default weights; the student is no scale of the teacher."""

    def keep_first(trainer: DistillTrainer, batch: dict[str, Any]) -> None:
        if not begun:
            begun.append(distiller_tensors(trainer))

    return train_student(full_cache, tmp_path_factory.mktemp("together"), *LOSSES, before_batch=keep_first)


def usual(name: str, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or (name in SIGNED and value != 0))


def test_results_have_a_column_for_every_term_of_training_and_none_of_validation(together: Run) -> None:
    rows = results(together.folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for name in LOSSES:
        assert all(usual(name, float(row[f"train/{name}_loss"])) for row in rows), name
        assert f"val/{name}_loss" not in rows[0]


def test_shares_of_the_gradient_are_logged_every_epoch(together: Run) -> None:
    rows = gradients(together.folder)
    assert [(row["epoch"], row["term"]) for row in rows] == [(epoch, name) for epoch in "12" for name in LOSSES]
    for row in rows:
        assert 0 < float(row["share"]) < 1
        assert float(row["weight"]) == pytest.approx(LOSSES[row["term"]].default_weight, rel=1e-5)


def test_every_adapter_parameter_is_trained(together: Run, begun: list[dict[str, Tensor]]) -> None:
    distiller = unwrap_model(together.trainer.model).kd
    names = {name for name, _ in distiller.named_parameters()}
    with_adapters = {name.split(".")[1] for name in names}
    assert with_adapters >= {"cwd", "mimic", "mgd", "fgd", "crosskd", "ho", "sl2"}
    after = together.adapters
    still = {name for name in names if torch.equal(after[name], begun[0][name])}
    # On maps of 8x8 cells and less a critic's attention sees a single cell, from which nothing can be told.
    blind = {name for name in names if ".critics." in name and (".query." in name or ".key." in name)}
    assert still <= blind


def test_the_optimizer_holds_every_parameter_once_but_those_of_critics(together: Run) -> None:
    student = unwrap_model(together.trainer.model)
    held = [id(p) for group in together.trainer.optimizer.param_groups for p in group["params"]]
    trained = {id(p) for name, p in student.named_parameters() if ".critics." not in name}
    assert len(held) == len(set(held))
    assert set(held) == trained
    assert any(".critics." in name for name, _ in student.named_parameters())
    assert not [name for name in together.trainer.ema.ema.state_dict() if name.startswith("kd.")]


def test_the_run_records_what_it_was_trained_from(together: Run, full_cache: Path) -> None:
    record = yaml.safe_load((together.folder / "cache_kd.yaml").read_text())
    assert record["cache"] == str(full_cache.resolve())
    assert record["losses"] == [str(parse_loss(name)) for name in LOSSES]
    assert record["views"] == ["mixed-0000", "mixed-0001", "plain-0000"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone_teaches(full_cache: Path, tmp_path: Path, name: str) -> None:
    run = train_student(full_cache, tmp_path, name, val=True)
    assert all(usual(name, float(row[f"train/{name}_loss"])) for row in results(run.folder))
    assert [0 < float(row["share"]) < 1 for row in gradients(run.folder)] == [True, True]
    assert all(value.isfinite().all() for value in run.student.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, method in LOSSES.items() if "layers" in method.allowed])
@pytest.mark.parametrize("student", ["yolov8n.yaml", "yolo26n.yaml"])
def test_each_method_on_maps_teaches_a_backbone(full_cache: Path, tmp_path: Path, name: str, student: str) -> None:
    run = train_student(full_cache, tmp_path, f"{name}:layers={LAYERS}", student=student, epochs=1, close_mosaic=0)
    (row,) = results(run.folder)
    assert usual(name, float(row[f"train/{name}_loss"]))
    (share,) = gradients(run.folder)
    assert 0 < float(share["share"]) < 1


@pytest.mark.slow
@pytest.mark.parametrize("student", ["yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml"])
def test_other_families_learn_from_all_losses(full_cache: Path, tmp_path: Path, student: str) -> None:
    # YOLO26 has no bins to compare.
    names = [name for name in LOSSES if name != "ld" or "26" not in student]
    run = train_student(full_cache, tmp_path, *names, student=student, epochs=1, close_mosaic=0)
    (row,) = results(run.folder)
    assert all(usual(name, float(row[f"train/{name}_loss"])) for name in names)
    assert all(torch.isfinite(value).all() for value in run.student.values())
