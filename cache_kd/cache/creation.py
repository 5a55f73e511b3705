"""In: what a new cache is to hold. Out: the folder begun, or an earlier one found to be the same, else what differs."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_kd.cache.files import (
    TEMPORARY,
    clear_errors,
    make_folder,
    parse_json,
    read_inside,
    sha256,
    sweep,
    write_atomic,
)
from cache_kd.cache.last_use import LAST_USE
from cache_kd.cache.layout import DTYPES, check_array_name, group_metadata, teacher_metadata, teacher_path
from cache_kd.cache.lock import HOLDER, LOCK
from cache_kd.cache.manifest import MAX_JSON_BYTES, NAME, ROOT, TeacherArray, load_manifest, read_root, root_attributes
from cache_kd.cache.shard import with_checksum
from cache_kd.errors import DamagedCacheError, MismatchError, SettingError
from cache_kd.fingerprint import (
    OtherIdentityError,
    SourceImage,
    canonical_json,
    differences,
    digest_sources,
    listed,
    source_changes,
)
from cache_kd.structures import Column

DATA = "data.json"
OWN = (LOCK, HOLDER)
FOLDERS = ("teacher", "units", "views")


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
        return root_attributes(self.identity, self.columns, self.num_images)


def check_folder(path: Path) -> None:
    """Raise `SettingError` if `path` is a file or holds anything but a cache."""
    if path.exists() and not path.is_dir():
        raise SettingError(f"{path} is a file; give a folder for the cache")
    if not path.is_dir() or (path / ROOT).exists():
        return
    if others := [name for name in sorted(os.listdir(path)) if name not in OWN and not name.startswith(TEMPORARY)]:
        raise SettingError(
            f"{path} holds other files (for example {others[0]}) and is no cache; give a new or empty folder"
        )


def discard(path: Path) -> None:
    """Delete the cache at `path`; killed in the middle of it, what is left can be gone on with.

    Links are deleted, not followed. A folder that holds other files stays, with them.
    """
    with clear_errors(path, "deleting"):
        for entry in path.iterdir():
            if entry.name in FOLDERS and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name in (*FOLDERS, NAME, DATA, LAST_USE) or entry.name.startswith(TEMPORARY):
                entry.unlink()
        for name in (ROOT, *OWN):
            (path / name).unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()


def create_or_check(path: Path, start: Start) -> tuple[Start, dict[str, TeacherArray]]:
    """Begin the cache at `path`, or go on with it if it is the same one; the caller holds its lock.

    Returns:
        What the cache was begun with: `start`, but for the names of its images; the teacher's arrays as the manifest
        lists them.
    """
    for name in start.teacher_arrays:
        check_array_name(name)
    check_folder(path)
    if (path / ROOT).exists():
        _check_same(path, read_root(path), start)
    else:
        write_atomic(path / ROOT, canonical_json(group_metadata({"cache_kd": start.attributes()})))
    sweep(path)
    start = replace(start, data=_write_or_take_data(path, start.data))
    make_folder(path / "teacher")
    _write_or_check(path, "teacher/zarr.json", canonical_json(group_metadata({})), "the teacher's group")
    return start, {name: _write_array(path, name, array) for name, array in sorted(start.teacher_arrays.items())}


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


def _check_same(path: Path, found: dict[str, Any], start: Start) -> None:
    """Raise `OtherIdentityError` naming each part in which the cache at `path` differs: what it has, what is wanted."""
    wanted = start.attributes()
    # What follows from the identity, such as the columns, is named only where the identity does not say why.
    held = found.get("identity")
    identity = held if isinstance(held, dict) else {}
    differing = differences(identity, wanted["identity"]) or differences(found, wanted)
    if not differing:
        return
    data = _data_changes(path, identity, start) if any(change.part.startswith("data.") for change in differing) else []
    named = [change for change in differing if not (data and change.part.startswith("data."))]
    raise OtherIdentityError(
        f"{path} is a cache of something else ({listed([*named, *data])}); give another --cache, or the same settings",
        differing,
    )


def _data_changes(path: Path, identity: dict[str, Any], start: Start) -> list[str]:
    """Return which images and labels differ; nothing unless `data.json` lists those of the cache's identity."""
    try:
        recorded = _images(parse_json(read_inside(os.path.realpath(path), DATA, MAX_JSON_BYTES), path / DATA))
    except DamagedCacheError:
        return []
    sound = digest_sources(recorded) == identity.get("data")
    return source_changes(recorded, _images(start.data)) if sound else []


def _images(data: Any) -> list[SourceImage]:
    rows = data.get("images") if isinstance(data, dict) else None
    kinds = [str, int, str, str]
    if not isinstance(rows, list) or any(not isinstance(row, list) or [*map(type, row)] != kinds for row in rows):
        return []
    return [SourceImage(*row) for row in rows]


def _write_or_take_data(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Write `data.json`, or return the one that a manifest vouches for, if it lists the same images by content.

    Their files may have other names meanwhile. Before there is a manifest, the identity alone says which images.
    """
    content = canonical_json(wanted)
    sealed = _sealed(path)
    if sealed is None or sealed == sha256(content):
        if not (path / DATA).is_file() or (path / DATA).is_symlink() or (path / DATA).read_bytes() != content:
            write_atomic(path / DATA, content)
        return wanted
    found = read_inside(os.path.realpath(path), DATA, MAX_JSON_BYTES)
    if sha256(found) != sealed:
        raise DamagedCacheError(f"{path / DATA} is not the one that {NAME} names; run `cache-kd verify {path}`")
    recorded = parse_json(found, path / DATA)
    before, after = _images(recorded), _images(wanted)
    changes = source_changes(before, after)
    if changes or not before:
        raise MismatchError(
            f"{path / DATA} differs: the ordered images are not those of this cache ({listed(changes)}); "
            "give another --cache"
        )
    return dict(recorded)


def _sealed(path: Path) -> str | None:
    """Return the sha256 of `data.json` in the manifest, None without a whole one: it is written again at the end."""
    try:
        return load_manifest(path).data_sha256 if (path / NAME).is_file() else None
    except DamagedCacheError:
        return None
