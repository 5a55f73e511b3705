"""In: the real data sets. Out: small copies that a test may change, and checkpoints built from model YAMLs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, SegmentationModel, yaml_model_load

from cache_kd.pipeline.versions import cpu_threads

BCCD_NAMES = ("RBC", "WBC", "Platelets")
CORNERS = 8
IMAGES, SHARD = 10, 4
"""Training images of the fixture `data_file`; samples of a shard under the fixture `small_shards`."""
TAPS = ("C3", "C4", "6", "8", "12.cv1")
"""The layers in the caches that hold some."""


def copy_split(source: Path, target: Path, split: str, count: int, *, polygons: int | None = None) -> None:
    """Copy the first `count` images of a split with their labels; with `polygons` only so many, as outlines."""
    for folder in ("images", "labels"):
        (target / folder / split).mkdir(parents=True)
    for image in sorted((source / "images" / split).iterdir())[:count]:
        shutil.copyfile(image, target / "images" / split / image.name)
        label = source / "labels" / split / f"{image.stem}.txt"
        if label.exists():
            text = label.read_text()
            (target / "labels" / split / label.name).write_text(as_polygons(text, polygons) if polygons else text)


def as_polygons(text: str, count: int) -> str:
    """Return the first box labels `class x y w h` as octagons that touch all four sides of their boxes."""
    lines = []
    for line in text.splitlines()[:count]:
        name, *numbers = line.split()
        x, y, w, h = map(float, numbers)
        angles = [2 * math.pi * corner / CORNERS for corner in range(CORNERS)]
        points = [f"{x + w / 2 * math.cos(a):.6f} {y + h / 2 * math.sin(a):.6f}" for a in angles]
        lines.append(f"{name} {' '.join(points)}")
    return "\n".join(lines)


def small_data(source: Path, target: Path, *, train: int, val: int = 2, polygons: int | None = None) -> Path:
    """Copy a few images of the data set at `source` (bccd or coco128) and return the copy's data file."""
    content = yaml.safe_load((source / f"{source.name}.yaml").read_text())
    for split, count in (("train", train), ("val", val)):
        copy_split(source, target, split, count, polygons=polygons)
    file = target / f"{source.name}.yaml"
    file.write_text(yaml.safe_dump({"train": "images/train", "val": "images/val", "names": content["names"]}))
    return file


def build_model(name: str, names: Sequence[str] = BCCD_NAMES, *, seed: int = 0, imgsz: int = 160) -> nn.Module:
    """Return a model of a YAML with random weights that tells images apart, in train mode, with its `args`."""
    kind = SegmentationModel if "-seg" in name else DetectionModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind(yaml_model_load(name), nc=len(names), verbose=False)
        settle_statistics(model)
    model.names = dict(enumerate(names))
    model.args = get_cfg(overrides={"imgsz": imgsz})
    return model


def settle_statistics(model: nn.Module) -> None:
    """Give every batch norm the statistics of coarse noise, shifted a little, and uneven weights.

    With the statistics of a fresh model (mean 0, variance 1) the signal dies on its way through a deep network, and all
    images look alike to it.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.1)
        norm.momentum, norm.kept = 1.0, norm.momentum
    with torch.no_grad():
        model.train()(nn.functional.interpolate(torch.rand(8, 3, 12, 12), size=96, mode="bilinear"))
    for norm in norms:
        norm.momentum = norm.__dict__.pop("kept")
        norm.running_mean += norm.running_var.sqrt() * torch.randn(norm.num_features) * 0.1
        norm.running_var *= torch.empty(norm.num_features).uniform_(0.8, 1.25)
        norm.num_batches_tracked.zero_()


def save_model(model: nn.Module, path: Path, **train_args: Any) -> Path:
    """Write a model as Ultralytics' trainer does: half precision, with what its training recorded."""
    model.args = dict(train_args)
    torch.save({"model": model.half(), "train_args": train_args}, path)
    return path


@contextmanager
def extraction_threads() -> Iterator[None]:
    """Compute with as many threads as the extraction does: another number rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(cpu_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_times(file: Path) -> bytes:
    """Return the content of a file of a cache; of a unit's record without how often it was tried and its seconds."""
    content = file.read_bytes()
    if file.parent.name != "units":
        return content
    try:
        record = json.loads(content)
        varying = ("attempt", "seconds", "checksum")
        return json.dumps({key: record[key] for key in record if key not in varying}).encode()
    except (ValueError, TypeError):  # damaged
        return content
