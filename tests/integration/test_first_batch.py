"""A training draws its first batch with the teacher's boxes; that changes nothing in the run and never ends it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from student_runs import differing, train_student

from cache_kd.pipeline import stored_boxes
from cache_kd.pipeline.opened import Cache
from cache_kd.structures import View
from cache_kd.ultralytics_bridge import first_batch
from cache_kd.ultralytics_bridge.first_batch import NAME

SHORT: dict[str, Any] = {"epochs": 1, "close_mosaic": 0, "plots": True}


def test_the_first_batch_is_drawn_and_the_run_stays_as_it_is(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Path, list[Any]]] = []

    def watched(path: Path, title: str, cells: list[Any]) -> Path:
        drawn.append((path, cells))
        return first_batch_sheet(path, title, cells)

    first_batch_sheet = first_batch.sheet
    monkeypatch.setattr(first_batch, "sheet", watched)
    with_picture = train_student(few_cache, tmp_path / "a", "cwd", **SHORT)
    ((path, cells),) = drawn
    assert path == with_picture.folder / NAME and path in with_picture.trainer.plots
    assert (with_picture.folder / "train_batch0.jpg").exists()
    assert min(imread(path).shape[:2]) > 300
    # the items of the first batch, by the pixels, the labels and the boxes that the cache holds of them
    cache = Cache(few_cache)
    boxes = stored_boxes.stored_boxes(cache)
    assert boxes is not None and len(cells) == 4
    names = [Path(image.path).name for image in cache.images]
    for cell in cells:
        index = names.index(cell.title)
        sample = cache.dataset.sample(View("mixed", 0), index)
        assert np.array_equal(cell.pixels, sample.pixels)
        labels, teacher = cell.layers
        np.testing.assert_allclose(labels.boxes, sample.boxes, atol=1e-3)
        assert np.array_equal(teacher.boxes, boxes(View("mixed", 0), index).boxes.numpy())
    without = train_student(few_cache, tmp_path / "b", "cwd", **{**SHORT, "plots": False})
    assert not (without.folder / NAME).exists()
    assert differing(with_picture.student, without.student) == []
    assert differing(with_picture.adapters, without.adapters) == []


def test_a_picture_that_cannot_be_written_is_a_warning(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(first_batch, "sheet", full)
    with caplog.at_level(logging.WARNING, "cache_kd"):
        run = train_student(few_cache, tmp_path, "cwd", **SHORT)
    assert not (run.folder / NAME).exists() and (run.folder / "results.csv").exists()
    (line,) = [record.getMessage() for record in caplog.records if NAME in record.getMessage()]
    assert line.endswith(f"{NAME} was not drawn: no space left")
