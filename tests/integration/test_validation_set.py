"""Validation sees what the stock validation sees, whatever lies beside the images, and leaves that as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_inputs import small_data
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader, build_yolo_dataset
from ultralytics.models.yolo.detect import DetectionValidator

from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.scan import validation_set

BATCH = 4


@pytest.fixture
def data(test_data: Path, tmp_path: Path) -> Path:
    """The data file of twelve images to validate on."""
    return small_data(test_data / "data" / "bccd", tmp_path / "data", train=1, val=12)


def settings(data: Path, **more: Any) -> Any:
    return get_cfg(overrides={"data": str(data), "imgsz": 160, "task": "detect", "plots": False, **more})


def ours(data: Path, **more: Any) -> Any:
    mapping, cfg = load_data(data), settings(data, **more)
    return validation_set(cfg, mapping["val"], batch=BATCH, data=mapping, mode="val", stride=32)


def stock(data: Path, **more: Any) -> Any:
    mapping, cfg = load_data(data), settings(data, **more)
    return build_yolo_dataset(cfg, mapping["val"], BATCH, mapping, mode="val", rect=True, stride=32)


def test_every_item_is_the_stock_sets(data: Path) -> None:
    mine = list(ours(data, classes=[0, 2]))
    theirs = list(stock(data, classes=[0, 2]))
    assert len(mine) == len(theirs) == 12
    for found, expected in zip(mine, theirs, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert np.array_equal(found[key], value), key
    assert any(len(item["cls"]) for item in mine)


def test_the_metrics_are_the_stock_sets(data: Path, bccd_teacher: Path, tmp_path: Path) -> None:
    results = []
    for made in (ours(data), stock(data)):
        loader = build_dataloader(made, BATCH, workers=0, shuffle=False)
        validator = DetectionValidator(loader, save_dir=tmp_path / "val", args=vars(settings(data, device="cpu")))
        results.append({key: float(value) for key, value in validator(model=str(bccd_teacher)).items()})
    assert results[0] == results[1]
    assert results[0]["metrics/mAP50-95(B)"] > 0.1, "a model that finds nothing shows nothing"


@pytest.mark.parametrize("cache", [False, "ram"])
def test_arrays_beside_the_images_are_neither_read_nor_removed(data: Path, cache: object) -> None:
    expected = [item["img"].clone() for item in ours(data)]
    arrays = []
    for number, image in enumerate(sorted((data.parent / "images" / "val").glob("*.jpg"))):
        arrays.append(image.with_suffix(".npy"))
        if number % 2:
            np.save(arrays[-1], np.zeros((64, 64, 3), np.uint8))
        else:
            arrays[-1].write_bytes(b"broken")
        os.utime(arrays[-1], (2**31, 2**31))  # newer than the image: the stock set takes it
    assert [torch.equal(item["img"], image) for item, image in zip(ours(data, cache=cache), expected, strict=True)] == [
        True
    ] * 12
    assert all(array.exists() for array in arrays)


def test_a_read_only_data_set_is_read(data: Path) -> None:
    folders = [path for path in data.parent.rglob("*") if path.is_dir()]
    before = sorted((path, path.stat().st_mtime_ns) for path in data.parent.rglob("*"))
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert len(ours(data)) == 12
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert sorted((path, path.stat().st_mtime_ns) for path in data.parent.rglob("*")) == before
