"""In: the installed Ultralytics. Out: the same, checked for its version and set to load checkpoints safely."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# Read by Ultralytics at its import: checkpoints as data, not as code, and nothing installed at run time.
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

import torch
import ultralytics
from torch import nn
from ultralytics.nn import tasks

from cache_kd.errors import CacheKDError, MissingFileError, SettingError

SUPPORTED = ((8, 4, 190), (8, 5, 0))


def check_version() -> None:
    """Raise `CacheKDError` unless the installed Ultralytics is one that this bridge was written for."""
    found = tuple(int(part) for part in re.findall(r"\d+", ultralytics.__version__)[:3])
    low, high = SUPPORTED
    if not low <= found < high:
        raise CacheKDError(
            f"ultralytics {ultralytics.__version__} is installed, cache-kd needs >=8.4.190,<8.5; "
            "run: pip install 'ultralytics>=8.4.190,<8.5'"
        )


@contextlib.contextmanager
def safe_loading(*, trusted: bool = False) -> Iterator[None]:
    """Load checkpoints and model YAML inside this scope as data only, or, when `trusted`, as Ultralytics does."""
    before = tasks.SAFE_LOAD
    tasks.SAFE_LOAD = not trusted
    try:
        yield
    finally:
        tasks.SAFE_LOAD = before


def import_user_modules(files: Iterable[str | Path]) -> None:
    """Run the user's own Python files and make their `nn.Module` classes known to model YAMLs and to safe loading.

    Raises:
        MissingFileError: A file is not there.
        SettingError: A file fails while it runs.
    """
    for file in map(Path, files):
        if not file.is_file():
            raise MissingFileError(f"--import {file}: no such file")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None:
            raise SettingError(f"--import {file}: not a Python file; allowed: my_modules.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # pickled classes name their module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the user's file raises is the message
            raise SettingError(f"--import {file}: {type(error).__name__}: {error}") from error
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == file.stem:
                setattr(tasks, name, value)
                torch.serialization.add_safe_globals([value])


check_version()
