"""In: what a new cache is to hold. Out: the folder begun, or an earlier one found to be the same, else what differs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_kd.cache.files import TEMPORARY, make_folder, read_inside, sha256, sweep, write_atomic
from cache_kd.cache.layout import DTYPES, FORMAT, check_array_name, group_metadata, teacher_metadata, teacher_path
from cache_kd.cache.manifest import MAX_JSON_BYTES, ROOT, TeacherArray, columns_to_json, read_root
from cache_kd.cache.shard import with_checksum
from cache_kd.errors import MismatchError, SettingError
from cache_kd.fingerprint import canonical_json
from cache_kd.structures import Column

DATA = "data.json"
_SHOWN = 60


@dataclass(frozen=True)
class Start:
    """What is known of a cache before its first unit; see `CacheWriter.open_or_create`."""

    identity: dict[str, Any]
    data: dict[str, Any]
    columns: tuple[Column, ...]
    num_images: int
    teacher_arrays: dict[str, np.ndarray]

    def attributes(self) -> dict[str, Any]:
        """Return what the root group says of this cache, as JSON gives it back."""
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "columns": columns_to_json(self.columns),
            "num_images": self.num_images,
        }
        return dict(json.loads(canonical_json(content)))


def check_folder(path: Path) -> None:
    """Raise `SettingError` if `path` is a file or holds anything but a cache."""
    if path.exists() and not path.is_dir():
        raise SettingError(f"{path} is a file; give a folder for the cache")
    if not path.is_dir() or (path / ROOT).exists():
        return
    if others := [name for name in sorted(os.listdir(path)) if name != ".lock" and not name.startswith(TEMPORARY)]:
        raise SettingError(
            f"{path} holds other files (for example {others[0]}) and is no cache; give a new or empty folder"
        )


def create_or_check(path: Path, start: Start) -> dict[str, TeacherArray]:
    """Begin the cache at `path`, or go on with it if it is the same one; the caller holds its lock.

    Returns:
        The teacher's arrays as the manifest lists them.
    """
    for name in start.teacher_arrays:
        check_array_name(name)
    attributes = start.attributes()
    check_folder(path)
    if (path / ROOT).exists():
        _check_same(path, read_root(path), attributes)
    else:
        write_atomic(path / ROOT, canonical_json(group_metadata({"cache_kd": attributes})))
    sweep(path)
    _write_or_check(path, DATA, canonical_json(start.data), "the ordered images")
    make_folder(path / "teacher")
    _write_or_check(path, "teacher/zarr.json", canonical_json(group_metadata({})), "the teacher's group")
    return {name: _write_array(path, name, array) for name, array in sorted(start.teacher_arrays.items())}


def _write_array(path: Path, name: str, array: np.ndarray) -> TeacherArray:
    dtype = array.dtype.str[1:]
    if dtype not in DTYPES or array.size == 0:
        raise SettingError(
            f"teacher array {name!r}: {array.dtype} {array.shape}; allowed: at least one of {', '.join(DTYPES)}"
        )
    content = with_checksum(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    relative = teacher_path(name, array.ndim)
    make_folder((path / relative).parent)
    metadata = canonical_json(teacher_metadata(array.shape, dtype))
    _write_or_check(path, f"teacher/{name}/zarr.json", metadata, f"the teacher's array {name}")
    _write_or_check(path, relative, content, f"the teacher's array {name}")
    return TeacherArray(dtype, array.shape, sha256(content))


def _write_or_check(path: Path, relative: str, content: bytes, what: str) -> None:
    """Write a file that never changes; raises `MismatchError` if it is there with another content."""
    if not os.path.lexists(path / relative):
        write_atomic(path / relative, content)
    elif read_inside(os.path.realpath(path), relative, max(len(content) + 1, MAX_JSON_BYTES)) != content:
        raise MismatchError(f"{path / relative} differs: {what} are not those of this cache; give another --cache")


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `MismatchError` naming each part in which the cache at `path` differs: what it has, what is wanted."""
    old, new = _parts(found), _parts(wanted)
    absent = object()
    differing = [key for key in sorted({*old, *new}) if old.get(key, absent) != new.get(key, absent)]
    if differing:
        listed = "; ".join(f"{key}: {_short(old, key)} there, {_short(new, key)} wanted" for key in differing)
        raise MismatchError(
            f"{path} is a cache of something else ({listed}); give another --cache, or the same settings"
        )


def _parts(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables by dotted name; those of the identity without its prefix."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            leaves.update(_parts(value, "" if name == "identity" else f"{name}."))
        else:
            leaves[name] = value
    return leaves


def _short(parts: dict[str, Any], key: str) -> str:
    if key not in parts:
        return "nothing"
    text = json.dumps(parts[key], ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
