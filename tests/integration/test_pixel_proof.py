"""A target belongs to exactly the pixels that the student sees: training and verify notice when it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_inputs import build_model, save_model
from student_runs import train_student

from cache_kd.errors import MismatchError, SettingError
from cache_kd.pipeline.verification import verify
from cache_kd.structures import SampleTargets
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.teacher import Teacher


@pytest.fixture
def another_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoded image is one level brighter somewhere, as another JPEG library might have it."""
    stock = ViewDataset.load_image

    def brighter(self: ViewDataset, i: int, *args: Any, **options: Any) -> Any:
        image, original, resized = stock(self, i, *args, **options)
        image[::2] = np.minimum(image[::2], 254) + 1
        return image, original, resized

    monkeypatch.setattr(ViewDataset, "load_image", brighter)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("another_decoder")
def test_training_stops_at_other_pixels(few_cache: Path, tmp_path: Path, workers: int) -> None:
    with pytest.raises(
        MismatchError, match=r"has other pixels than the teacher saw: hash \w{16}, stored \w{16}; the lib"
    ):
        train_student(few_cache, tmp_path, "cwd", epochs=1, workers=workers)


@pytest.mark.usefixtures("another_decoder")
def test_the_proof_can_be_switched_off(few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cache_kd.pipeline import training

    plan = training.distill_plan

    def unproven(*args: Any) -> Any:
        made = plan(*args)
        return replace(made, targets=replace(made.targets, verify="off"))

    monkeypatch.setattr(training, "distill_plan", unproven)
    assert train_student(few_cache, tmp_path, "cwd", epochs=1).adapters


@pytest.mark.usefixtures("another_decoder")
def test_verify_names_every_view_with_other_pixels(few_cache: Path) -> None:
    found = verify(few_cache, pixels=True, say=print)
    assert not found.ok
    assert (found.pixels_checked, len(found.pixel_faults)) == (36, 36)
    assert "mixed-0000, item 0 (" in found.pixel_faults[0]


def test_verify_notices_targets_out_of_their_bound(
    few_cache: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = Teacher.__call__

    def off(self: Teacher, views: list[Any], *, batch: int) -> list[SampleTargets]:
        said = stock(self, views, batch=batch)
        return [replace(one, features=(one.features[0], one.features[1] + 1.0, one.features[2])) for one in said]

    monkeypatch.setattr(Teacher, "__call__", off)
    found = verify(few_cache, teacher=test_data / "weights" / "yolov8s-bccd.pt", sample=4, say=print)
    assert not found.ok and found.worst > 1
    assert {fault.split(": ")[1].split(" is")[0] for fault in found.target_faults} == {"features P4"}


def test_verify_refuses_another_teacher(few_cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    save_model(build_model("yolov8s.yaml", ["RBC", "WBC", "Platelets"], seed=1, imgsz=64), other, data="bccd.yaml")
    says = (
        r"other.pt is not the teacher of .* \(teacher.weights: \w{12} there, \w{12} wanted\); "
        r"give the one that it was extracted with: --teacher best.pt"
    )
    with pytest.raises(MismatchError, match=says):
        verify(few_cache, teacher=other, say=print)


def test_a_sample_of_nothing_is_refused(few_cache: Path) -> None:
    with pytest.raises(SettingError, match="--sample 0; allowed: 1 or more"):
        verify(few_cache, sample=0, say=print)
