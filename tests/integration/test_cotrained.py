"""A teacher trained beside its student: both learn in the same steps, apart, and go on together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_inputs import build_model, save_model
from student_runs import FAST, Interrupt, results
from ultralytics import YOLO
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.errors import MismatchError
from cache_kd.losses import parse_losses
from cache_kd.ultralytics_bridge.baseline import epoch_to_resume
from cache_kd.ultralytics_bridge.cotrained import SIDECAR, CotrainedTrainer
from cache_kd.ultralytics_bridge.gate import safe_loading
from cache_kd.ultralytics_bridge.teacher import load_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher of the classes of bccd."""
    return save_model(build_model("yolov8n.yaml", seed=3), tmp_path_factory.mktemp("teacher") / "t.pt", imgsz=64)


def trainer_of(teacher: Path, data: Path, project: Path, loss: str = "sl2", **settings: Any) -> CotrainedTrainer:
    own = {"model": "yolov8n.yaml", "data": str(data), "imgsz": 64, "project": str(project), "name": "run"}
    checkpoint = load_teacher(teacher)
    return CotrainedTrainer(checkpoint, parse_losses([loss]), {**own, **FAST, "workers": 0, **settings})


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def trained(teacher: Path, few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> CotrainedTrainer:
    """Two epochs of both."""
    run = trainer_of(teacher, few_images, tmp_path_factory.mktemp("cotrained"))
    run.train()
    return run


def test_both_learn_in_the_same_steps(trained: CotrainedTrainer, teacher: Path) -> None:
    before = load_teacher(teacher).model.state_dict()
    after = trained.teacher.state_dict()
    weights = [name for name in before if name.endswith(("weight", "bias")) and ".dfl." not in name]
    assert all(not torch.equal(before[name], after[name]) for name in weights)
    assert torch.equal(before["model.22.dfl.conv.weight"], after["model.22.dfl.conv.weight"])
    assert trained.forwards == 2 * 12
    rows = results(Path(trained.save_dir))
    assert all(float(row["train/sl2_loss"]) > 0 for row in rows)


def test_the_student_alone_is_saved(trained: CotrainedTrainer) -> None:
    saved = YOLO(trained.last).model
    student = {name for name in unwrap_model(trained.model).state_dict() if not name.startswith("kd.")}
    assert set(saved.state_dict()) == student
    assert type(saved).__module__.startswith("ultralytics.")


@pytest.mark.slow
def test_without_weight_the_student_is_that_of_a_silent_teacher_and_the_teacher_learns_alone(
    teacher: Path, few_images: Path, tmp_path: Path
) -> None:
    """No gradient of the one reaches the other: the student is the same beside another teacher."""
    other = save_model(build_model("yolov8n.yaml", seed=9), tmp_path / "other.pt", imgsz=64)
    runs = []
    for number, file in enumerate((teacher, other, teacher)):
        loss = "sl2:weight=0" if number < 2 else "sl2"
        run = trainer_of(file, few_images, tmp_path / str(number), loss, epochs=1)
        run.train()
        runs.append(run)
    silent, beside_other, taught = ({**tensors(run.ema.ema)} for run in runs)
    assert all(torch.equal(silent[name], beside_other[name]) for name in silent)
    assert any(not torch.equal(silent[name], taught[name]) for name in silent)
    alone, teaching = (tensors(runs[number].teacher) for number in (0, 2))
    assert all(torch.equal(alone[name], teaching[name]) for name in alone)


@pytest.mark.slow
def test_a_run_goes_on_with_the_teacher_it_had(teacher: Path, few_images: Path, tmp_path: Path) -> None:
    run = trainer_of(teacher, few_images, tmp_path, epochs=3)
    kept: dict[str, torch.Tensor] = {}

    def stop(trainer: CotrainedTrainer) -> None:
        if trainer.epoch == 1:
            kept.update(tensors(trainer.teacher))
            raise Interrupt

    run.add_callback("on_train_epoch_start", stop)
    with pytest.raises(Interrupt, match=r"^$"):
        run.train()
    last = tmp_path / "run" / "weights" / "last.pt"
    assert epoch_to_resume(last, 3) == 1
    place = {"model": str(last), "resume": str(last), "save_dir": str(tmp_path / "run")}
    with safe_loading():
        again = trainer_of(teacher, few_images, tmp_path, epochs=3, **place)
    found: dict[str, torch.Tensor] = {}
    again.add_callback("on_train_start", lambda trainer: found.update(tensors(trainer.teacher)))
    again.train()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert len(results(tmp_path / "run")) == 3
    assert epoch_to_resume(last, 3) == 3
    (last.with_name(SIDECAR)).unlink()
    assert epoch_to_resume(last.with_name("none.pt"), 3) is None


def test_a_teacher_of_other_classes_is_refused(few_images: Path, tmp_path: Path) -> None:
    file = save_model(build_model("yolov8n.yaml", ["a", "b", "c"]), tmp_path / "t.pt", imgsz=64)
    run = trainer_of(file, few_images, tmp_path)
    with pytest.raises(MismatchError, match=r"knows the classes a, b, c, the data set has RBC"):
        run.train()
