"""Fixtures that many integration tests share: a few real images and one small cache of them, made once."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_inputs import IMAGES, SHARD, TAPS, build_model, save_model, small_data

from cache_kd.cache.last_use import LAST_USE

if TYPE_CHECKING:
    from cache_kd.ultralytics_bridge.teacher import Checkpoint


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


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained YOLOv8n with the classes of bccd, which loads quickly; no test may change it."""
    return save_model(build_model("yolov8n.yaml", seed=3), tmp_path_factory.mktemp("teacher") / "best.pt")


@pytest.fixture(scope="session")
def data_file(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data file of `IMAGES` images of bccd; no test may change it."""
    return small_data(test_data / "data" / "bccd", tmp_path_factory.mktemp("ten"), train=IMAGES)


@pytest.fixture(scope="session")
def few(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data file of four images of bccd; no test may change it."""
    return small_data(test_data / "data" / "bccd", tmp_path_factory.mktemp("four"), train=4)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SHARD` samples a shard, so several shards a view, and one thread, which on a busy machine waits for no other."""
    from cache_kd.cache import layout
    from cache_kd.pipeline import preparation

    monkeypatch.setattr(layout, "MAX_SAMPLES", SHARD)
    monkeypatch.setattr(preparation, "cpu_threads", lambda: 1)


@pytest.fixture(scope="session")
def bccd_teacher(test_data: Path) -> Path:
    """The teacher of all caches of bccd."""
    return test_data / "weights" / "yolov8s-bccd.pt"


@pytest.fixture(scope="session")
def bccd_checkpoint(bccd_teacher: Path) -> Checkpoint:
    """The same, loaded; no test may change it."""
    from cache_kd.ultralytics_bridge.teacher import load_teacher

    return load_teacher(bccd_teacher)


@pytest.fixture
def loaded_once(bccd_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test that changes no teacher the reading of one."""
    from cache_kd.pipeline import preparation

    fresh = replace(bccd_checkpoint, model=copy.deepcopy(bccd_checkpoint.model))
    monkeypatch.setattr(preparation, "load_teacher", lambda path, trusted: fresh)


@pytest.fixture
def own_data(few_images: Path, tmp_path: Path) -> Path:
    """A copy of `few_images` that a test may change; returns its data file."""
    shutil.copytree(few_images.parent, tmp_path / "set", ignore=shutil.ignore_patterns("*.cache"))
    return tmp_path / "set" / few_images.name


@pytest.fixture
def own_cache(few_cache: Path, tmp_path: Path) -> Path:
    """A copy of `few_cache` that a test may change, as if it had never been used."""
    return Path(shutil.copytree(few_cache, tmp_path / "copied" / "cache", ignore=shutil.ignore_patterns(LAST_USE)))
