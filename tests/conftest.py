"""In: the folder of real data that CACHE_KD_TEST_DATA names. Out: fixtures of its parts; Ultralytics kept to itself.

Nothing here imports torch or Ultralytics: their settings are read on import, so they stand in the environment first.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

DATA_VARIABLE = "CACHE_KD_TEST_DATA"
STRICT_VARIABLE = "CACHE_KD_FORBID_SKIPS"
MAY_BE_SKIPPED = ("gpu", "network", "browser")
ROOT = Path(__file__).resolve().parents[1]


def _prepare_environment() -> None:
    """Keep Ultralytics' settings out of the home folder, offline, without installing; use the cores we may use."""
    config_dir = tempfile.mkdtemp(prefix="cache-kd-tests-")
    atexit.register(_remove_own, Path(config_dir), os.getpid())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.update(YOLO_CONFIG_DIR=config_dir, YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", MPLBACKEND="Agg")
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a shared machine several times slower


def _remove_own(folder: Path, owner: int) -> None:
    """Remove `folder` at exit of the process that made it, not of the workers it forked."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


_prepare_environment()


def data_folder() -> Path:
    """Return the folder of test data, present or not."""
    return Path(os.environ.get(DATA_VARIABLE) or ROOT.parent / "shared").resolve()


def _part(folder: Path, name: str) -> Path:
    """Return a part of the test data; skips when it is absent."""
    path = folder / name
    if not path.exists():
        pytest.skip(f"{path} is missing; {DATA_VARIABLE} names the folder that holds data/ and weights/")
    return path


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data sets and weights, read-only; the test is skipped when it is absent."""
    return _part(data_folder(), "data").parent


@pytest.fixture(scope="session")
def bccd(test_data: Path) -> Path:
    """Data file of BCCD: 3 classes of blood cells."""
    return _part(test_data, "data/bccd/bccd.yaml")


@pytest.fixture(scope="session")
def bccd_teacher(test_data: Path) -> Path:
    """Checkpoint of a YOLOv8s trained on BCCD at 320."""
    return _part(test_data, "weights/yolov8s-bccd.pt")


@pytest.fixture(scope="session")
def coco128(test_data: Path) -> Path:
    """Data file of COCO128: 80 classes."""
    return _part(test_data, "data/coco128/coco128.yaml")


@pytest.fixture(scope="session")
def yolov8n_coco(test_data: Path) -> Path:
    """Checkpoint of a YOLOv8n of the 80 COCO classes."""
    return _part(test_data, "weights/yolov8n-int8deq.pt")


@pytest.fixture(scope="session")
def yolo11n_coco(test_data: Path) -> Path:
    """Checkpoint of a YOLO11n of the 80 COCO classes."""
    return _part(test_data, "weights/yolo11n-int8deq.pt")


@pytest.fixture(scope="session")
def writable_bccd(bccd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data file of a copy of BCCD where Ultralytics may write its label caches; shared by all tests."""
    folder = tmp_path_factory.mktemp("data") / "bccd"
    for source in sorted(path for path in bccd.parent.rglob("*") if path.is_file()):
        target = folder / source.relative_to(bccd.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return folder / bccd.name


def _forbids_skips() -> bool:
    return bool(os.environ.get(STRICT_VARIABLE)) and (data_folder() / "data").exists()


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure where CACHE_KD_FORBID_SKIPS is set and the data is there."""
    if report.skipped and _forbids_skips():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, though {STRICT_VARIABLE} is set and the test data is there: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hold every test but those that need a GPU, the internet or a browser to the rule on skips."""
    report = yield
    if not hasattr(report, "wasxfail") and not any(item.get_closest_marker(mark) for mark in MAY_BE_SKIPPED):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Hold whole modules to the same rule."""
    report = yield
    _fail_if_skipped(report)
    return report
