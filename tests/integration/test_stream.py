"""Batches between workers and trainer: in shared memory, still compressed, and no larger than is stated."""

from __future__ import annotations

import io
import logging
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from student_runs import train_student
from torch import Tensor
from torch.utils.data import DataLoader

from cache_kd.errors import SettingError
from cache_kd.losses import parse_losses
from cache_kd.pipeline import training
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.student.loader import ViewSampler
from cache_kd.student.prefetch import SHARED_MEMORY
from cache_kd.student.schedule import ViewSchedule
from cache_kd.ultralytics_bridge import stream
from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.plan import DistillPlan
from cache_kd.ultralytics_bridge.training_data import PackedTrainingDataset, TrainingDataset

PICKLED = 64 << 10
LARGE = 4096
"""Bytes above which a tensor is no table or label; the views and features of these caches have over a hundred kB."""
BATCH = 4


class Made(NamedTuple):
    """A batch, which of its tensors lay in shared memory before it was sent, and the bytes that go through a pipe."""

    batch: dict[str, Any]
    shared: dict[str, bool]
    pickled: int


class Watched:
    """A collation that reports on its batch; module level, as a worker may have to unpickle it."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: list[dict[str, Any]]) -> Made:
        batch = self.collate(items)
        shared = {key: value.is_shared() for key, value in batch.items() if isinstance(value, Tensor)}
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(batch)
        return Made(batch, shared, buffer.tell())


@pytest.fixture(scope="module", params=["replay", "packed"])
def plan(
    request: pytest.FixtureRequest,
    few_cache: Path,
    few_images: Path,
    bccd_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[DistillPlan, Any]:
    """The plan of a training with losses that read all columns, and its data set."""
    path = few_cache
    if request.param == "packed":
        where = tmp_path_factory.mktemp("packed") / "cache"
        path = extract(
            ExtractSettings(bccd_teacher, few_images, where, views=1, plain_views=0, imgsz=64, batch=4, pack="jpeg")
        ).path
    cache = Cache(path, data=few_images)
    found = training.distill_plan(cache, parse_losses(["ld", "bckd", "sl2"]), TrainSettings("yolov8n.yaml"))
    if found.packed is not None:
        return found, PackedTrainingDataset(found.packed, targets=found.targets)
    settings: dict[str, Any] = {"recipe": found.recipe, "imgsz": found.imgsz, "seed": found.seed}
    return found, TrainingDataset(load_data(cache.data_file()), targets=found.targets, **settings)


@pytest.fixture(scope="module")
def made(plan: tuple[DistillPlan, Any]) -> list[Made]:
    """Batches from two workers."""
    found, dataset = plan
    schedule = ViewSchedule.for_cache(found.views, epochs=2, close=0)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=BATCH,
        sampler=ViewSampler(len(dataset), schedule),
        num_workers=2,
        collate_fn=Watched(dataset.collate_fn),
    )
    return list(loader)


def large(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.nbytes > LARGE}


def test_no_large_array_is_pickled(made: list[Made]) -> None:
    for each in made:
        assert sum(value.nbytes for value in large(each.batch).values()) > PICKLED
        assert each.pickled < PICKLED


def test_pixels_and_targets_are_joined_in_shared_memory(made: list[Made]) -> None:
    for each in made:
        assert {"img", "kd_features"} <= set(large(each.batch))
        assert [key for key in large(each.batch) if not each.shared[key]] == []


def test_targets_arrive_as_they_are_stored(made: list[Made]) -> None:
    for each in made:
        assert {key: value.dtype for key, value in large(each.batch).items() if value.dtype != torch.uint8} == {}


def test_a_batch_is_no_larger_than_is_stated(made: list[Made], plan: tuple[DistillPlan, Any]) -> None:
    targets = plan[0].targets
    assert targets is not None
    stated = BATCH * (3 * plan[0].imgsz ** 2 + targets.row_bytes)
    for each in made:
        held = sum(each.batch[key].nbytes for key in each.shared if key == "img" or key.startswith("kd_"))
        assert 0.5 * stated < held <= stated


def test_workers_make_the_batches_that_one_process_makes(made: list[Made], plan: tuple[DistillPlan, Any]) -> None:
    found, dataset = plan
    schedule = ViewSchedule.for_cache(found.views, epochs=2, close=0)
    alone = DataLoader(
        dataset, batch_size=BATCH, sampler=ViewSampler(len(dataset), schedule), collate_fn=dataset.collate_fn
    )
    for mine, theirs in zip(alone, made, strict=True):
        tensors = {key: value for key, value in mine.items() if isinstance(value, Tensor)}
        assert tensors.keys() == theirs.shared.keys()
        assert [key for key, value in tensors.items() if not torch.equal(value, theirs.batch[key])] == []


def test_a_run_without_room_in_shared_memory_is_refused(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "free_shared_memory", lambda: 0)
    with pytest.raises(SettingError, match=rf"^workers=2 need .* {SHARED_MEMORY} has 0 MiB free; train with workers=0"):
        train_student(few_cache, tmp_path / "runs", "ld", "bckd", workers=2)
    assert not (tmp_path / "runs").exists()


def test_a_run_says_what_loading_takes(few_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cache_kd"):
        train_student(few_cache, tmp_path, "ld", "bckd", epochs=1)
    assert "loading takes at most" in caplog.text
