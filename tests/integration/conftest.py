"""Fixtures that many integration tests share: a few real images and one small cache of them, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_inputs import small_data


@pytest.fixture(scope="session")
def few_images(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data file of twelve images of bccd to train on and two to validate on; no test may change it."""
    return small_data(test_data / "data" / "bccd", tmp_path_factory.mktemp("few"), train=12)


@pytest.fixture(scope="session")
def few_cache(few_images: Path, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of `few_images` at 64 pixels, two mixed views and a plain one; its teacher's file is gone."""
    from cache_kd.pipeline.extraction import ExtractSettings, extract

    folder = tmp_path_factory.mktemp("few_cache")
    teacher = Path(shutil.copyfile(test_data / "weights" / "yolov8s-bccd.pt", folder / "best.pt"))
    extract(ExtractSettings(teacher, few_images, folder / "cache", views=2, plain_views=1, imgsz=64, batch=4))
    teacher.unlink()
    return folder / "cache"
