"""In: JSON of unit records and of `shards.json`. Out: the files that exist, with size and hashes, as laid out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cache_kd.cache.files import brief, open_seal, seal
from cache_kd.cache.layout import FORMAT, ArrayLayout
from cache_kd.errors import DamagedCacheError
from cache_kd.fingerprint import canonical_json
from cache_kd.structures import View

UNITS = "units"
_UNIT = re.compile(rf"{UNITS}/((?:mixed|plain)-\d+)-(\d+)\.json")
_KEYS = {"path": str, "bytes": int, "sha256": str, "tail": str}
_SHAPES = {"sha256": re.compile(r"[0-9a-f]{64}"), "tail": re.compile(r"[0-9a-f]{8}")}


@dataclass(frozen=True)
class FileEntry:
    """One shard file: path in the cache, bytes, sha256 of all of it, crc32c of its end (see `tail_checksum`)."""

    path: str
    bytes: int
    sha256: str
    tail: str


@dataclass(frozen=True)
class UnitRecord:
    """A finished unit: one shard of all columns of one view.

    Attributes:
        attempt: counts from 1 how often it was made. seconds: what it took, by stage; {} where nobody measured.
    """

    view: View
    shard: int
    attempt: int
    environment: dict[str, Any]
    files: tuple[FileEntry, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def content(self) -> bytes:
        """Return what the record's file holds."""
        return seal(
            {
                "format": FORMAT,
                "view": self.view.name,
                "shard": self.shard,
                "attempt": self.attempt,
                "environment": self.environment,
                "seconds": dict(self.seconds),
                "files": [asdict(entry) for entry in self.files],
            }
        )


def record_path(view: View, shard: int) -> str:
    return f"{UNITS}/{view.name}-{shard:05d}.json"


def recorded_unit(path: str) -> tuple[View, int] | None:
    """Return the unit whose record the file `path` is; None if it is none."""
    match = _UNIT.fullmatch(path)
    return (View.parse(match[1]), int(match[2])) if match else None


def shards_path(view: View) -> str:
    return f"views/{view.name}/shards.json"


def parse_record(data: Any, view: View, shard: int, layouts: Mapping[str, ArrayLayout]) -> UnitRecord:
    """Return the record in `data`; raises `DamagedCacheError` unless it is that of this unit and lists its files."""
    fixed = {"format": FORMAT, "view": view.name, "shard": shard}
    data = open_seal(data)
    if any(data.get(key) != value for key, value in fixed.items()):
        raise DamagedCacheError(f"not the record of unit {view.name} {shard}")
    if type(data.get("attempt")) is not int or not isinstance(data.get("environment"), dict):
        raise DamagedCacheError("attempt or environment is missing")
    seconds = data.get("seconds")
    if not isinstance(seconds, dict) or any(type(value) not in (int, float) or value < 0 for value in seconds.values()):
        raise DamagedCacheError("seconds are no table of numbers from 0")
    files = _parse_files(data.get("files"), [layout.shard_path(view, shard) for layout in layouts.values()])
    return UnitRecord(view, shard, data["attempt"], data["environment"], files, data["seconds"])


def shards_json(view: View, entries: Iterable[FileEntry]) -> bytes:
    """Return the content of a view's `shards.json`."""
    files = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.path)]
    return canonical_json({"format": FORMAT, "view": view.name, "files": files})


def parse_shards(data: Any, view: View, layouts: Mapping[str, ArrayLayout]) -> dict[str, FileEntry]:
    """Return the files of `view` by path; raises `DamagedCacheError` unless those of the layout are listed."""
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("view") != view.name:
        raise DamagedCacheError(f"not the list of files of {view.name}")
    files, count = data.get("files"), sum(layout.num_shards for layout in layouts.values())
    if not isinstance(files, list) or len(files) != count:  # first: a manifest may declare more files than fit memory
        found = len(files) if isinstance(files, list) else "no"
        raise DamagedCacheError(f"{found} files are listed, those of the layout are {count}")
    expected = [layout.shard_path(view, shard) for layout in layouts.values() for shard in range(layout.num_shards)]
    return {entry.path: entry for entry in _parse_files(files, expected)}


def _parse_files(data: Any, expected: list[str]) -> tuple[FileEntry, ...]:
    entries: list[FileEntry] = []
    for item in data if isinstance(data, list) else []:
        if not isinstance(item, dict) or set(item) != set(_KEYS):
            raise DamagedCacheError(f"a file has exactly the keys {', '.join(_KEYS)}")
        wrong = [key for key, kind in _KEYS.items() if type(item[key]) is not kind]
        wrong += [key for key, shape in _SHAPES.items() if not wrong and not shape.fullmatch(item[key])]
        if wrong or item["bytes"] < 0:
            raise DamagedCacheError(f"file {brief(repr(item['path']))}: wrong {', '.join(wrong) or 'bytes'}")
        entries.append(FileEntry(**item))
    listed = [entry.path for entry in entries]
    if sorted(listed) != sorted(expected):
        odd = brief((sorted(set(listed) ^ set(expected)) or listed)[:1])
        raise DamagedCacheError(f"the files listed are not those of the layout, for example {odd}")
    return tuple(entries)
