"""In: the installed Ultralytics. Out: the same, checked for its version and set to load checkpoints safely."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

# Read by Ultralytics at its import: checkpoints as data, not as code, and nothing installed at run time, whatever the
# user's environment says.
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")
os.environ["YOLO_AUTOINSTALL"] = "false"

import torch
import ultralytics
from torch import nn
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine import trainer, validator
from ultralytics.nn import tasks
from ultralytics.utils import checks

from cache_kd.errors import CacheKDError, InputDataError, MissingFileError, SettingError
from cache_kd.fingerprint import digest_file

LOG = logging.getLogger(__name__)
SUPPORTED = ((8, 4, 190), (8, 5, 0))
OWN = ("ultralytics.", "torch.")
_SHOWN = 200


def check_version() -> None:
    """Raise `CacheKDError` unless the installed Ultralytics is one that this bridge was written for."""
    found = tuple(int(part) for part in re.findall(r"\d+", ultralytics.__version__)[:3])
    low, high = SUPPORTED
    if not low <= found < high:
        raise CacheKDError(
            f"ultralytics {ultralytics.__version__} is installed, cache-kd needs >=8.4.190,<8.5; "
            "run: pip install 'ultralytics>=8.4.190,<8.5'"
        )
    if not tasks._SafeLoad.SUPPORTED:  # Ultralytics would then load checkpoints as code without a word
        raise CacheKDError(f"torch {torch.__version__} cannot load checkpoints safely; run: pip install 'torch>=2.6'")


@contextlib.contextmanager
def safe_loading(*, trusted: bool = False) -> Iterator[None]:
    """Load checkpoints and model YAML inside this scope as data only, or, when `trusted`, as Ultralytics does."""
    before = tasks.SAFE_LOAD
    tasks.SAFE_LOAD = not trusted
    try:
        yield
    finally:
        tasks.SAFE_LOAD = before


@contextlib.contextmanager
def no_download_entries() -> Iterator[None]:
    """Have Ultralytics' trainer and validator inside this scope never follow a data file's `download:` entry."""
    stay = partial(check_det_dataset, autodownload=False)
    with mock.patch.object(trainer, "check_det_dataset", stay), mock.patch.object(validator, "check_det_dataset", stay):
        yield


def checkpoint_globals(path: Path) -> list[str] | None:
    """Return the names of the code that the pickle in a checkpoint asks for, without running any.

    None: a file of another kind than torch writes, whose names cannot be listed.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # any fault of a file that its loader will describe
        return None


def announce_trusted(what: str, path: Path) -> None:
    """Warn that a file is about to be loaded as code: its sha256 and what it would run."""
    if path.suffix == ".pt":
        named = checkpoint_globals(path)
        runs = "names that cannot be listed" if named is None else ", ".join(named) or "nothing"
    else:
        found = re.findall(r"^\s*[\"']?activation[\"']?\s*:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        runs = f"its activation {', '.join(found)}" if found else "nothing"
    LOG.warning("%s %s (sha256 %s) is loaded as code: %s", what, path, digest_file(path), runs)


@contextlib.contextmanager
def readable(what: str, path: Path, trust: str) -> Iterator[None]:
    """Turn whatever Ultralytics raises while it loads or builds a model into one line that names the file.

    Args:
        trust: the option that lets the file run code.

    Raises:
        InputDataError: The file is unusable, or needs `trust` or --import.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says what is wrong
            yield
    except CacheKDError:
        raise
    except Exception as error:  # Ultralytics raises many kinds here; all mean that this file is no usable model
        named = (checkpoint_globals(path) or []) if path.suffix == ".pt" else []
        foreign = [name for name in named if not name.startswith(OWN)]
        hint = f"; it names {', '.join(foreign[:3])}: --import your_modules.py or {trust}" if foreign else ""
        if "restricted" in str(error):
            hint = f"; it may run code, which only {trust} allows"
        reason = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
        if isinstance(error, KeyError) and path.suffix != ".pt":  # Ultralytics looks a layer's class up by its name
            reason, hint = f"no layer or key {reason}", "; a layer of your own: --import your_modules.py"
        kind = "is not a usable Ultralytics checkpoint" if path.suffix == ".pt" else "is not a usable model YAML"
        raise InputDataError(f"{what} {path} {kind}: {reason}{hint}") from error


def check_checkpoint(what: str, path: Path, *, trusted: bool, trust: str) -> None:
    """Load a checkpoint once as data and forget it; a trusted one is announced instead.

    Raises:
        InputDataError: It cannot be loaded as data; the message says what it names and which option allows it.
    """
    if trusted:
        announce_trusted(what, path)
        return
    with safe_loading(), readable(what, path, trust):
        tasks.load_checkpoint(str(path), device="cpu")


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


checks.AUTOINSTALL = False  # also where Ultralytics was imported before this module
check_version()
