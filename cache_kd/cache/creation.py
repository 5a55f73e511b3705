"""In: what a new cache is to hold. Out: the folder begun, or an earlier one found to be the same, else what differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_kd.cache.attempts import ATTEMPTS
from cache_kd.cache.files import TEMPORARY, parse_json, sha256
from cache_kd.cache.last_use import LAST_USE
from cache_kd.cache.layout import (
    DTYPES,
    check_array_name,
    group_metadata,
    shard_size,
    teacher_metadata,
    teacher_path,
)
from cache_kd.cache.lock import is_lock_file
from cache_kd.cache.manifest import (
    MAX_JSON_BYTES,
    NAME,
    ROOT,
    TeacherArray,
    data_limit,
    load_manifest,
    read_root,
    root_attributes,
)
from cache_kd.cache.shard import with_checksum
from cache_kd.cache.store import Store
from cache_kd.errors import DamagedCacheError, InputDataError, MismatchError, SettingError
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
PLAN = "extraction.json"
FOLDERS = ("teacher", "units", "views", ATTEMPTS)


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


@dataclass(frozen=True)
class Begun:
    """A cache that was begun: all that its manifest says of it whatever is extracted.

    Attributes:
        shard_size: samples a shard, which follows from what was expected of its columns.
        arrays: the teacher's arrays by name. data_sha256: of `data.json`.
    """

    identity: dict[str, Any]
    columns: tuple[Column, ...]
    num_images: int
    shard_size: int
    arrays: dict[str, TeacherArray]
    data_sha256: str


def check_place(store: Store) -> bool:
    """Return whether there is nothing at all yet; raises `SettingError` for a place that holds anything but a cache."""
    names = store.entries()
    if names is None or ROOT in names:
        return names is None
    if others := [name for name in names if not is_lock_file(name) and not name.startswith(TEMPORARY)]:
        raise SettingError(
            f"{store.place} holds other files (for example {others[0]}) and is no cache; give a new or empty folder"
        )
    return False


def discard(store: Store) -> None:
    """Delete the cache in `store`; killed in the middle of it, what is left can be gone on with.

    Links are deleted, not followed. A folder that holds other files stays, with them.
    """
    for name in store.entries() or ():
        if name in FOLDERS:
            store.delete_below(name)
        elif name in (NAME, DATA, PLAN, LAST_USE) or name.startswith(TEMPORARY):
            store.delete(name)
    for name in (ROOT, *filter(is_lock_file, store.entries() or ())):
        store.delete(name)
    store.end()


def create_or_check(store: Store, start: Start, *, alone: bool = True) -> Begun:
    """Begin the cache in `store`, or go on with it if it is the same one; the caller holds its lock.

    Args:
        alone: nobody else writes, so what is half-written was left behind, and is deleted.
    """
    for name in start.teacher_arrays:
        check_array_name(name)
    check_place(store)
    root = canonical_json(group_metadata({"cache_kd": start.attributes()}))
    if store.exists(ROOT) or not store.create(ROOT, root):
        _check_same(store, read_root(store), start)
    if alone:
        store.sweep()
    data = _write_or_take_data(store, start.data, start.num_images)
    _write_or_check(store, "teacher/zarr.json", canonical_json(group_metadata({})), "the teacher's group")
    arrays = {name: _write_array(store, name, array) for name, array in sorted(start.teacher_arrays.items())}
    size = shard_size(start.columns)
    return Begun(start.identity, start.columns, start.num_images, size, arrays, sha256(data))


def _write_array(store: Store, name: str, array: np.ndarray) -> TeacherArray:
    dtype = array.dtype.str[1:]
    if dtype not in DTYPES or array.size == 0:
        raise SettingError(
            f"teacher array {name!r}: {array.dtype} {array.shape}; allowed: at least one of {', '.join(DTYPES)}"
        )
    content = with_checksum(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    relative = teacher_path(name, array.ndim)
    metadata = canonical_json(teacher_metadata(array.shape, dtype))
    _write_or_check(store, f"teacher/{name}/zarr.json", metadata, f"the teacher's array {name}")
    _write_or_check(store, relative, content, f"the teacher's array {name}")
    return TeacherArray(dtype, array.shape, sha256(content))


def _write_or_check(store: Store, relative: str, content: bytes, what: str) -> None:
    """Write a file that never changes; raises `MismatchError` if it is there with another content."""
    if not store.exists(relative) and store.create(relative, content):
        return
    if store.read(relative, max(len(content) + 1, MAX_JSON_BYTES)) != content:
        raise MismatchError(
            f"{store.where(relative)} differs: {what} are not those of this cache; give another --cache"
        )


def _check_same(store: Store, found: dict[str, Any], start: Start) -> None:
    """Raise `OtherIdentityError` naming each part in which the cache in `store` differs: what is there and wanted."""
    wanted = start.attributes()
    # What follows from the identity, such as the columns, is named only where the identity does not say why.
    held = found.get("identity")
    identity = held if isinstance(held, dict) else {}
    differing = differences(identity, wanted["identity"]) or differences(found, wanted)
    if not differing:
        return
    data = _data_changes(store, identity, start) if any(change.part.startswith("data.") for change in differing) else []
    named = [change for change in differing if not (data and change.part.startswith("data."))]
    raise OtherIdentityError(
        f"{store.place} is a cache of something else ({listed([*named, *data])}); give another --cache, or the same "
        "settings",
        differing,
    )


def _data_changes(store: Store, identity: dict[str, Any], start: Start) -> list[str]:
    """Return which images and labels differ; nothing unless `data.json` lists those of the cache's identity."""
    try:
        found = store.read(DATA, data_limit(start.num_images))
        recorded = _images(parse_json(found, store.where(DATA)))
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


def _write_or_take_data(store: Store, wanted: dict[str, Any], num_images: int) -> bytes:
    """Write `data.json` and return it, or the one that a manifest vouches for, if it lists the same images by content.

    Their files may have other names meanwhile. Before there is a manifest, the identity alone says which images.
    """
    content, limit = canonical_json(wanted), data_limit(num_images)
    if len(content) > limit:  # before an extraction that nobody could read afterwards
        raise InputDataError(
            f"{store.where(DATA)} would have {len(content)} bytes for {num_images} images; allowed: {limit}; give the "
            "images shorter paths below their common folder, or divide the data set"
        )
    sealed = _sealed(store)
    if sealed is None or sealed == sha256(content):
        if store.size(DATA) != len(content) or store.read(DATA, len(content)) != content:
            store.write(DATA, content)
        return content
    found = store.read(DATA, limit)
    if sha256(found) != sealed:
        raise DamagedCacheError(
            f"{store.where(DATA)} is not the one that {NAME} names; run `cache-kd verify {store.place}`"
        )
    recorded = parse_json(found, store.where(DATA))
    before, after = _images(recorded), _images(wanted)
    changes = source_changes(before, after)
    if changes or not before:
        raise MismatchError(
            f"{store.where(DATA)} differs: the ordered images are not those of this cache ({listed(changes)}); "
            "give another --cache"
        )
    return found


def _sealed(store: Store) -> str | None:
    """Return the sha256 of `data.json` in the manifest, None without a whole one: it is written again at the end."""
    try:
        return load_manifest(store).data_sha256 if store.exists(NAME) else None
    except DamagedCacheError:
        return None
