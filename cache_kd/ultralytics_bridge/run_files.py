"""In: what a training writes into its folder. Out: files that are whole at every moment, each epoch once in the tables.

Ultralytics writes checkpoints in place: killed in the middle of it, a run had no checkpoint to resume from.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ultralytics.engine import trainer as engine
from ultralytics.utils.torch_utils import strip_optimizer

from cache_kd.cache.files import clear_errors, publish, write_atomic
from cache_kd.errors import DiskSpaceError, InputDataError
from cache_kd.ultralytics_bridge.gate import checkpoint_globals

NEXT = ".next"


def next_to(path: Path) -> Path:
    """Return the name under which the next content of `path` waits until it is whole."""
    return path.with_name(path.name + NEXT)


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write what `torch.save` makes of `content` as `path`, whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def publish_next(path: Path) -> None:
    """Rename the next content of `path`, if there is one, to `path`, once it is on the disk."""
    waiting = next_to(path)
    if waiting.exists():
        publish(waiting, path)


def read_sidecar(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what a file beside last.pt holds, {epoch, state}, read as data whatever the student is trusted with.

    Raises:
        InputDataError: Not such a file, or one that names code.
    """
    try:
        held = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds here; all mean that these are no adapters
        named = ", ".join(checkpoint_globals(path) or []) or "nothing"
        raise InputDataError(
            f"{path} does not hold adapters as data (it names {named}); start a new run, its other files are no use"
        ) from error
    if not isinstance(held, dict) or type(held.get("epoch")) is not int or not isinstance(held.get("state"), dict):
        raise InputDataError(f"{path} does not hold adapters: expected an epoch and their state; start a new run")
    return held


def sidecar_of(path: Path, epoch: int, device: torch.device) -> tuple[Path, dict[str, Any]] | None:
    """Return the file, `path` or its next content, that belongs to last.pt at `epoch`, and the state that it holds.

    Killed between the two renames, a run leaves both; only one of them is of last.pt's epoch.
    """
    for file in (path, next_to(path)):
        if file.exists() and (held := read_sidecar(file, device))["epoch"] == epoch:
            return file, held["state"]
    return None


@contextlib.contextmanager
def written_aside(owner: Any, *names: str) -> Iterator[None]:
    """Let the paths that `owner` has under `names` be written beside them inside this scope; then rename, in order."""
    paths = {name: Path(getattr(owner, name)) for name in names}
    for name, path in paths.items():
        setattr(owner, name, next_to(path))
    try:
        yield
    finally:
        for name, path in paths.items():
            setattr(owner, name, path)
    for path in paths.values():
        publish_next(path)


def keep_epochs(table: Path, last: int) -> None:
    """Drop the rows of a table of epochs that are to be done again: those after epoch `last`, counted from 1."""
    if not table.is_file():
        return
    with clear_errors(table, "reading"):
        lines = table.read_bytes().splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines) if line.endswith(b"\n") and (not number or _epoch(line) <= last)]
    if not kept:
        with clear_errors(table, "deleting"):
            table.unlink()  # whoever writes the first row writes the header again
    elif kept != lines:
        write_atomic(table, b"".join(kept))


def _epoch(row: bytes) -> float:
    first = row.partition(b",")[0]
    try:
        return float(first)
    except ValueError:  # a row torn by a crash of the machine
        return float("inf")


def drop_leftovers(folder: Path) -> None:
    """Delete the next contents that a killed run left in `folder`; call it when what is needed of them is published."""
    for path in folder.glob(f"*{NEXT}"):
        with clear_errors(path, "deleting"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def stripped_whole() -> Iterator[None]:
    """Have Ultralytics' last act, stripping checkpoints of their optimizer, replace each file by a whole one."""

    def strip(file: str | Path, s: str = "", updates: dict[str, Any] | None = None) -> Any:
        target = Path(s or file)
        found = strip_optimizer(file, s=str(next_to(target)), updates=updates)
        publish_next(target)
        return found

    with mock.patch.object(engine, "strip_optimizer", strip):
        yield


@contextlib.contextmanager
def full_disk_in_one_line(run: Path, last: Path) -> Iterator[None]:
    """Turn a disk's refusal inside this scope into one line: what could not be written, and how to go on."""
    try:
        with clear_errors(run, "writing"):
            yield
    except DiskSpaceError as error:
        again = f"go on: cache-kd train resume={last}" if last.exists() else "run the same command again"
        raise DiskSpaceError(f"{str(error).partition(';')[0]}; free some space and {again}") from error
    except RuntimeError as error:
        # torch.save reports every refusal of the disk so.
        if "PytorchStreamWriter" not in str(error):
            raise
        raise DiskSpaceError(
            f"{run}: a file could not be written whole; free some space and run the same command again"
        ) from error
