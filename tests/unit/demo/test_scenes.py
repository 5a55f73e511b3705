"""The demo's data set is the same bytes each time, has enough classes, and its labels lie on its objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_kd.demo.scenes import CLASSES, draw_dataset, draw_scene
from cache_kd.errors import SettingError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_arguments_draw_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        draw_dataset(tmp_path / name, images=6, val_images=2, imgsz=64, seed=3)
        np.random.default_rng(0).random()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_and_split_draw_other_images(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "a", images=4, val_images=4, imgsz=64, seed=0)
    draw_dataset(tmp_path / "b", images=4, val_images=4, imgsz=64, seed=1)
    drawn = [data for folder in "ab" for name, data in contents(tmp_path / folder).items() if name.endswith(".png")]
    assert len(drawn) == len(set(drawn)) == 16


def test_a_larger_set_begins_with_the_smaller(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "small", images=3, val_images=1, imgsz=64, seed=0)
    draw_dataset(tmp_path / "large", images=5, val_images=1, imgsz=64, seed=0)
    assert contents(tmp_path / "small").items() <= contents(tmp_path / "large").items()


def test_every_class_occurs_and_boxes_fit_the_image() -> None:
    placed = [item for seed in range(40) for item in draw_scene(np.random.default_rng(seed), 96)[1]]
    assert len(CLASSES) >= 6
    assert {item.number for item in placed} == set(range(len(CLASSES)))
    for item in placed:
        left, top, right, bottom = item.xyxy
        assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96


def test_sizes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="images=0 is too small; allowed: 1 or more"):
        draw_dataset(tmp_path, images=0, val_images=1, imgsz=64, seed=0)
