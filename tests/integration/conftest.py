"""Fixtures that many integration tests share: a few real images and one small cache of them, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_inputs import TAPS, small_data


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


def _extract_all(test_data: Path, data: Path, folder: Path, **options: Any) -> Path:
    """Extract `data` at 64 pixels with every store and layer that a loss may ask for, and let the teacher vanish."""
    from cache_kd.pipeline.extraction import ExtractSettings, extract

    teacher = Path(shutil.copyfile(test_data / "weights" / "yolov8s-bccd.pt", folder / "best.pt"))
    settings: dict[str, Any] = {"views": 2, "plain_views": 1, "imgsz": 64, "batch": 4, "device": "cpu", "workers": 0}
    extract(ExtractSettings(teacher, data, folder / "cache", taps=TAPS, **{**settings, **options}))
    teacher.unlink()
    return folder / "cache"


@pytest.fixture(scope="session")
def full_cache(few_images: Path, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache like `few_cache` with the layers `TAPS` and LD's valuable region: every loss can be trained from it."""
    store = ("features", "logits", "vlr")
    return _extract_all(test_data, few_images, tmp_path_factory.mktemp("full_cache"), store=store)


@pytest.fixture(scope="session")
def exact_cache(few_images: Path, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at fidelity "exact", all anchors in half precision, one mixed view and a plain one."""
    folder = tmp_path_factory.mktemp("exact_cache")
    return _extract_all(test_data, few_images, folder, fidelity="exact", views=1)
