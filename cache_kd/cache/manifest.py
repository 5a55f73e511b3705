"""In: `manifest.json` of a cache, or its parts. Out: a checked `Manifest`, or all faults of a bad one at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cache_kd.cache.files import brief, open_seal, parse_json, sha256
from cache_kd.cache.layout import (
    DTYPES,
    FORMAT,
    MAX_SAMPLES,
    MAX_SHARD_BYTES,
    check_array_name,
    column_faults,
    stored_columns,
)
from cache_kd.cache.places import open_store
from cache_kd.cache.store import Place, Store
from cache_kd.errors import DamagedCacheError, MismatchError, MissingFileError, SettingError
from cache_kd.fingerprint import canonical_json, digest_json
from cache_kd.structures import Column, HeadSpec, View

NAME = "manifest.json"
ROOT = "zarr.json"
MAX_JSON_BYTES = 256 * 2**20
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_DATA_BYTES = 4 * 2**30
_IMAGE_BYTES = 512
_LISTED = 20
_MAX_HEAD = {"levels": 16, "layers": 256, "channels": 2**16, "stride": 2**12, "reg_max": 2**10, "names": 2**16}
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TeacherArray:
    """One of the teacher's arrays: dtype and shape, and the sha256 of the file."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its values; the file has a checksum on top."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """What a complete cache holds.

    Attributes:
        identity: what the content depends on; identity_digest: sha256 of its canonical JSON.
        teacher: what is known of the checkpoint; arrays: its stored arrays by name.
        columns: as the codec declares them (length columns of ragged ones come on top); shard_size: samples a shard.
        views: in order; shards: sha256 of each view's `shards.json` by the view's name; data_sha256: of `data.json`.
        environment: versions and machine of the last extraction; not part of the digest.
        digest: sha256 over all shard files and the identity; equal content has equal digests on any machine.
    """

    format: int
    identity: dict[str, Any]
    identity_digest: str
    teacher: dict[str, Any]
    arrays: dict[str, TeacherArray]
    head: HeadSpec
    codec: dict[str, Any]
    columns: tuple[Column, ...]
    imgsz: int
    seed: int
    recipe: dict[str, Any]
    num_images: int
    shard_size: int
    views: tuple[View, ...]
    environment: dict[str, Any]
    data_sha256: str
    shards: dict[str, str]
    digest: str

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in _FIELDS}
        plain["arrays"] = {name: {**asdict(array), "shape": list(array.shape)} for name, array in self.arrays.items()}
        plain["head"] = self.head.to_json()
        plain["columns"] = columns_to_json(self.columns)
        plain["views"] = [view.name for view in self.views]
        return plain

    @classmethod
    def from_json(cls, data: Any, where: str = NAME) -> Manifest:
        """Return the manifest in `data`; raises `DamagedCacheError` that lists every fault."""
        if faults := _faults(data):
            raise DamagedCacheError(f"{where}: {'; '.join(brief(fault) for fault in faults[:_LISTED])}")
        parsed = {name: data[name] for name in _FIELDS}
        parsed["arrays"] = {
            name: TeacherArray(array["dtype"], tuple(array["shape"]), array["sha256"])
            for name, array in data["arrays"].items()
        }
        parsed["head"] = HeadSpec.from_json(data["head"])
        parsed["columns"] = columns_from_json(data["columns"])
        parsed["views"] = tuple(View.parse(name) for name in data["views"])
        return cls(**parsed)


_FIELDS = tuple(Manifest.__dataclass_fields__)


def data_limit(num_images: int) -> int:
    """Return how many bytes `data.json` of so many images may have: a row is about 130, most of it hashes."""
    return min(max(MAX_JSON_BYTES, num_images * _IMAGE_BYTES), MAX_DATA_BYTES)


def columns_to_json(columns: Iterable[Column]) -> list[dict[str, Any]]:
    """Return the columns as JSON; what was expected of their rows shows in the manifest's `shard_size`."""
    plain = [{**asdict(column), "shape": list(column.shape)} for column in columns]
    return [{key: value for key, value in column.items() if key != "expected"} for column in plain]


def columns_from_json(data: Any) -> tuple[Column, ...]:
    """Return the columns in `data`; raises `ValueError` saying what is wrong."""
    kinds = {
        "name": str,
        "dtype": str,
        "shape": list,
        "ragged": bool,
        "whole": bool,
        "typesize": int,
        "compressor": str,
    }
    columns: list[Column] = []
    for item in data if isinstance(data, list) else ["not a list"]:
        if not isinstance(item, dict) or set(item) != set(kinds):
            raise ValueError(f"a column has exactly the keys {', '.join(kinds)}")
        wrong = [key for key, kind in kinds.items() if type(item[key]) is not kind]
        if wrong or any(type(size) is not int for size in item["shape"]):
            raise ValueError(f"column {item['name']!r}: wrong type of {', '.join(wrong) or 'shape'}")
        columns.append(Column(**{**item, "shape": tuple(item["shape"])}))
    return tuple(columns)


def content_digest(identity: Mapping[str, Any], files: Iterable[tuple[str, str]]) -> str:
    """Return the cache's digest from its identity and the (relative path, sha256) of all shard files."""
    return sha256(
        canonical_json({"identity": dict(identity), "files": sorted([path, digest] for path, digest in files)})
    )


def read_root(place: Place | Store) -> dict[str, Any]:
    """Return the attributes of the cache at `place`, complete or not: format, identity, columns, num_images.

    Raises:
        MissingFileError: nothing there, or no cache. MismatchError: a cache of another format.
    """
    store = open_store(place)
    try:
        found = _find(store, ROOT)
        if found is None and not store.exists(NAME):
            raise _no_cache(store)
        if found is None:
            raise DamagedCacheError(f"{store.where(ROOT)}: the file is missing")
        content = parse_json(found, store.where(ROOT))
    except DamagedCacheError as error:
        raise DamagedCacheError(f"{error}; {_way_to_a_root(store)}") from error
    attributes = content.get("attributes") if isinstance(content, dict) else None
    ours = attributes.get("cache_kd") if isinstance(attributes, dict) else None
    if not isinstance(ours, dict) and store.exists(NAME):
        raise DamagedCacheError(f"{store.where(ROOT)} has no attribute cache_kd; {_way_to_a_root(store)}")
    if not isinstance(ours, dict):
        raise MissingFileError(f"{store.place} is not a cache of cache-kd: its {ROOT} has no attribute cache_kd")
    if ours.get("format") != FORMAT:
        raise MismatchError(
            f"{store.where(ROOT)} has cache format {ours.get('format')!r}, this version reads {FORMAT}; "
            "extract it again with `cache-kd extract`"
        )
    return ours


def _no_cache(store: Store) -> MissingFileError:
    make = "make one with `cache-kd extract --teacher best.pt`"
    if store.entries() is None:
        return MissingFileError(f"no cache at {store.place}; {make}")
    return MissingFileError(f"{store.place} is not a cache: it has no {ROOT}; {make}")


def read_manifest(place: Place | Store) -> Manifest:
    """Return the manifest of the complete cache at `place`.

    Raises:
        MissingFileError: no cache there. MismatchError: another format. DamagedCacheError: unfinished or damaged.
    """
    store = open_store(place)
    root = read_root(store)
    if not store.exists(NAME):
        raise DamagedCacheError(
            f"{store.place} has no {NAME}: an unfinished cache; run the same `cache-kd extract` again, it goes on "
            "where it was"
        )
    manifest = load_manifest(store)
    expected = root_attributes(manifest.identity, manifest.columns, manifest.num_images)
    if differing := sorted(key for key in {*root, *expected} if root.get(key) != expected.get(key)):
        raise DamagedCacheError(
            f"{store.where(ROOT)} and {NAME} name different {', '.join(differing)}; "
            f"`cache-kd verify {store.place} --repair` writes {ROOT} again"
        )
    return manifest


def _way_to_a_root(store: Store) -> str:
    """Return what to type when the root group is damaged: a sound manifest tells all that it said."""
    try:
        load_manifest(store)
    except DamagedCacheError:
        return f"nothing else tells what it said: delete {store.place} and extract again"
    return f"`cache-kd verify {store.place} --repair` writes it again"


def load_manifest(place: Place | Store) -> Manifest:
    """Return the manifest at `place`, whatever else is there; raises `DamagedCacheError` if missing or damaged."""
    store = open_store(place)
    where = store.where(NAME)
    try:
        content = _find(store, NAME)
        if content is None:
            raise DamagedCacheError(f"{where}: the file is missing")
        data = parse_json(content, where)
        try:
            fields = open_seal(data)
        except DamagedCacheError as error:
            raise DamagedCacheError(f"{where}: {error}") from error
        return Manifest.from_json(fields, where)
    except DamagedCacheError as error:
        raise DamagedCacheError(
            f"{error}; the same `cache-kd extract` writes it again from the records of the units"
        ) from error


def root_attributes(identity: Mapping[str, Any], columns: Iterable[Column], num_images: int) -> dict[str, Any]:
    """Return what the root group says of a cache, complete or not, as JSON gives it back."""
    content = {
        "format": FORMAT,
        "identity": dict(identity),
        "columns": columns_to_json(columns),
        "num_images": num_images,
    }
    return dict(json.loads(canonical_json(content)))


def _find(store: Store, name: str) -> bytes | None:
    try:
        return store.find(name, MAX_MANIFEST_BYTES)
    except DamagedCacheError as error:
        raise DamagedCacheError(f"{store.where(name)}: {error}") from error


def _faults(data: Any) -> list[str]:
    """Return what is wrong with a manifest's JSON, all of it."""
    if not isinstance(data, dict):
        return ["not a JSON object"]
    if data.get("format") != FORMAT:
        return [f"format is {data.get('format')!r}, this version reads {FORMAT}"]
    faults = [f"{name} is missing" for name in _FIELDS if name not in data]
    faults += [f"{name} is not known" for name in sorted(set(data) - set(_FIELDS))]
    for name, check in _CHECKS.items():
        if name in data and (fault := check(data[name])):
            faults.append(f"{name} {fault}")
    return faults or _cross_faults(data)


def _cross_faults(data: dict[str, Any]) -> list[str]:
    """Return what does not fit together in a manifest whose parts are each well formed."""
    faults: list[str] = []
    if data["identity_digest"] != digest_json(data["identity"]):
        faults.append("identity_digest is not that of identity")
    if set(data["shards"]) != set(data["views"]):
        faults.append("shards and views name different views")
    row = sum(c.row_bytes for c in stored_columns(columns_from_json(data["columns"])) if c.whole or not c.ragged)
    if data["shard_size"] > 1 and data["shard_size"] * row > MAX_SHARD_BYTES:
        faults.append(f"shard_size {data['shard_size']} times {row} bytes a sample is over {MAX_SHARD_BYTES} bytes")
    return faults


def _is_object(value: Any) -> str:
    return "" if isinstance(value, dict) else "is not an object"


def _is_hash(value: Any) -> str:
    return "" if isinstance(value, str) and _HASH.fullmatch(value) else "is not a sha256"


def _between(low: int, high: int) -> Callable[[Any], str]:
    return lambda value: (
        "" if type(value) is int and low <= value <= high else f"is {value!r}; allowed: {low} to {high}"
    )


def _head_fault(value: Any) -> str:
    try:
        head = HeadSpec.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"is not a head ({type(error).__name__}: {error})"
    taps = (*head.taps, *head.layers)
    sizes = {
        "levels": [len(head.taps)],
        "layers": [len(head.layers) + 1],
        "channels": [tap.channels for tap in taps] + list(head.hold),
        "stride": [tap.stride for tap in taps],
        "reg_max": [head.reg_max],
        "names": [len(head.names)],
    }
    return "; ".join(
        f"has {name} {min(found)} to {max(found)}; allowed: 1 to {_MAX_HEAD[name]}"
        for name, found in sizes.items()
        if found and (min(found) < 1 or max(found) > _MAX_HEAD[name])
    )


def _columns_fault(value: Any) -> str:
    try:
        columns = columns_from_json(value)
    except ValueError as error:
        return f"cannot be read: {error}"
    return "; ".join(column_faults(columns)) if columns else "is empty"


def _views_fault(value: Any) -> str:
    if not isinstance(value, list) or not value or any(not isinstance(name, str) for name in value):
        return "is not a list of names"
    try:
        if value != [view.name for view in sorted({View.parse(name) for name in value})]:
            return "is not sorted, or names a view twice"
    except SettingError as error:
        return f"cannot be read: {error}"
    return ""


def _shards_fault(value: Any) -> str:
    return (
        ""
        if isinstance(value, dict) and not any(_is_hash(item) for item in value.values())
        else "is not a table of sha256"
    )


def _arrays_fault(value: Any) -> str:
    if not isinstance(value, dict):
        return "is not an object"
    for name, array in value.items():
        try:
            check_array_name(name)
            known = (
                array["dtype"] in DTYPES
                and not _is_hash(array["sha256"])
                and set(array) == {"dtype", "shape", "sha256"}
            )
            if not known or any(type(size) is not int or not 1 <= size <= 2**31 for size in array["shape"]):
                return f"{name!r} has a wrong dtype, shape or sha256"
        except (SettingError, KeyError, TypeError) as error:
            return f"{name!r} cannot be read: {error}"
    return ""


_CHECKS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("identity", "teacher", "codec", "recipe", "environment"), _is_object),
    **dict.fromkeys(("identity_digest", "data_sha256", "digest"), _is_hash),
    "arrays": _arrays_fault,
    "head": _head_fault,
    "columns": _columns_fault,
    "imgsz": _between(1, 2**16),
    "seed": _between(-(2**63), 2**64),
    "num_images": _between(1, 2**40),
    "shard_size": _between(1, MAX_SAMPLES),
    "views": _views_fault,
    "shards": _shards_fault,
}
