"""In: a mark's path. Out: files that touch it if anything in them is run."""

from __future__ import annotations

import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from small_inputs import build_model
from ultralytics.nn.tasks import yaml_model_load


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


def expression(mark: Path) -> str:
    """Return a Python expression that touches `mark` and is a layer."""
    return f"__import__('pathlib').Path({str(mark)!r}).touch() or nn.SiLU()"


def checkpoint(path: Path, mark: Path) -> Path:
    """Write a checkpoint that is a usable model, with a canary beside it."""
    model = build_model("yolov8n.yaml").half()
    model.args = {}
    torch.save({"model": model, "train_args": {}, "epoch": -1, "more": Canary(mark)}, path)
    return path


def checkpoint_of_old_kind(path: Path, mark: Path) -> Path:
    """Write the same as a bare pickle, which torch reads too and whose names its scan cannot list."""
    path.write_bytes(pickle.dumps({"model": None, "more": Canary(mark)}))
    return path


def checkpoint_with_code(path: Path, mark: Path) -> Path:
    """Write a checkpoint of plain data whose own model YAML holds an expression."""
    model = build_model("yolov8n.yaml").half()
    model.args = {}
    model.yaml["activation"] = expression(mark)
    torch.save({"model": model, "train_args": {}, "epoch": -1}, path)
    return path


def model_yaml(path: Path, mark: Path, field: str = "activation") -> Path:
    """Write a model YAML with an expression in one of the fields that Ultralytics reads as code or names."""
    content = yaml_model_load("yolov8n.yaml")
    content.pop("yaml_file")
    code = expression(mark)
    if field == "activation":
        content["activation"] = code
    elif field == "module":
        content["backbone"][0][2] = code
    elif field == "function":  # not a layer, though Ultralytics' module knows the name
        content["backbone"][0][2:] = ["eval", [code]]
    elif field == "argument":
        content["backbone"][0][3][0] = code
    elif field == "tag":
        text = yaml.safe_dump(content)
        path.write_text(f"nc: !!python/object/apply:os.system ['touch {mark}']\n" + text)
        return path
    else:
        raise AssertionError(field)
    path.write_text(yaml.safe_dump(content))
    return path


def data_yaml(source: Path, path: Path, download: str, *, present: bool) -> Path:
    """Write a copy of a data file with a `download:` entry; its images are where the original's are, or nowhere."""
    content = yaml.safe_load(source.read_text())
    content["path"] = str(source.parent if present else path.parent / "gone")
    path.write_text(yaml.safe_dump({**content, "download": download}))
    return path


def label_cache(path: Path, mark: Path) -> Path:
    """Write a label cache of Ultralytics' kind that is a canary."""
    with path.open("wb") as file:
        np.save(file, np.array({"version": "1.0.3", "hash": "", "labels": Canary(mark)}, dtype=object))
    return path
