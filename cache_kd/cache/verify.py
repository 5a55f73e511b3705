"""In: a cache's folder. Out: a report of every fault: missing, cut, changed, foreign files, by view and samples."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_kd.cache.creation import DATA
from cache_kd.cache.files import TEMPORARY, find_leftovers, parse_json, read_inside, sha256
from cache_kd.cache.layout import CHECKSUM, ArrayLayout, check_metadata, check_with_zarr, teacher_metadata, teacher_path
from cache_kd.cache.manifest import MAX_JSON_BYTES, NAME, ROOT, Manifest, content_digest
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.records import FileEntry, shards_path
from cache_kd.cache.shard import check_frame, parse_index, without_checksum
from cache_kd.cache.writer import LOCK
from cache_kd.errors import CacheKDError, DamagedCacheError
from cache_kd.structures import View


@dataclass(frozen=True)
class Fault:
    """One fault: the file in the cache, what is wrong, and the view and samples (first, last) that it spoils if any."""

    file: str
    what: str
    view: str | None = None
    samples: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.view is None or self.samples is None:
            return f"{self.file}: {self.what}"
        first, last = self.samples
        samples = f"sample {first}" if first == last else f"samples {first} to {last}"
        return f"{self.file}: {self.what} (view {self.view}, {samples})"


@dataclass(frozen=True)
class VerifyReport:
    """What verification found: files and bytes read, faults, and notes that spoil nothing (files nobody listed)."""

    path: Path
    files: int
    bytes: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "ok": self.ok,
            "files": self.files,
            "bytes": self.bytes,
            "faults": [asdict(fault) for fault in self.faults],
            "notes": list(self.notes),
        }


def verify_cache(path: Path, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read the complete cache at `path` from end to end and return everything that is wrong with it.

    Args:
        progress: called with (bytes read, bytes in all) after each shard file.

    Raises:
        MissingFileError: no cache there. MismatchError: another format. DamagedCacheError: unfinished, or a manifest
            that cannot be read, without which nothing else means anything.
    """
    reader = CacheReader(path)
    manifest, root = reader.manifest, os.path.realpath(path)
    faults = [*_data_faults(reader), *_teacher_faults(root, manifest)]
    listed: dict[View, dict[str, FileEntry]] = {}
    for view in manifest.views:
        try:
            listed[view] = reader.files(view)
        except CacheKDError as error:
            faults.append(Fault(shards_path(view), str(error), view.name, (0, manifest.num_images - 1)))
    total = sum(entry.bytes for files in listed.values() for entry in files.values())
    seen = 0
    for view, files in listed.items():
        for layout in reader.layouts.values():
            faults += _metadata_faults(root, f"{layout.folder(view)}", layout.metadata())
            for shard in range(layout.num_shards):
                entry = files[layout.shard_path(view, shard)]
                faults += _shard_faults(root, view, layout, shard, entry)
                seen += entry.bytes
                if progress:
                    progress(seen, total)
    if len(listed) == len(manifest.views):
        entries = [(entry.path, entry.sha256) for files in listed.values() for entry in files.values()]
        if content_digest(manifest.identity, entries) != manifest.digest:
            faults.append(Fault(NAME, "digest is not that of the listed files and the identity"))
    count = sum(len(files) for files in listed.values())
    return VerifyReport(Path(path), count, seen, tuple(faults), tuple(_notes(Path(path), manifest, listed)))


def _data_faults(reader: CacheReader) -> list[Fault]:
    try:
        reader.read_data()
    except DamagedCacheError as error:
        return [Fault(DATA, str(error))]
    return []


def _teacher_faults(root: str, manifest: Manifest) -> list[Fault]:
    faults: list[Fault] = []
    for name, array in manifest.arrays.items():
        path = teacher_path(name, len(array.shape))
        faults += _metadata_faults(root, f"teacher/{name}", teacher_metadata(array.shape, array.dtype))
        try:
            content = read_inside(root, path, math.prod(array.shape) * np.dtype(array.dtype).itemsize + CHECKSUM)
            if sha256(content) != array.sha256:
                raise DamagedCacheError("sha256 does not match the manifest")
            without_checksum(content)
        except DamagedCacheError as error:
            faults.append(Fault(path, str(error)))
    return faults


def _metadata_faults(root: str, folder: str, expected: dict[str, Any]) -> list[Fault]:
    """Return what is wrong with an array's `zarr.json`, as the manifest and as zarr-python see it."""
    path = f"{folder}/{ROOT}"
    try:
        content = read_inside(root, path, MAX_JSON_BYTES)
        check_metadata(parse_json(content, Path(path)), expected, path)
        check_with_zarr(Path(root, folder), expected)
    except DamagedCacheError as error:
        return [Fault(path, str(error))]
    return []


def _shard_faults(root: str, view: View, layout: ArrayLayout, shard: int, entry: FileEntry) -> list[Fault]:
    """Return the faults of one shard file: of the file as a whole, then of each chunk whose bytes fail."""
    first, rows = shard * layout.samples, layout.rows(shard)
    everything = (first, first + rows - 1)
    try:
        content = read_inside(root, entry.path, entry.bytes)
    except DamagedCacheError as error:
        return [Fault(entry.path, str(error), view.name, everything)]
    if len(content) != entry.bytes:
        what = f"{len(content)} bytes, {shards_path(view)} says {entry.bytes}"
        return [Fault(entry.path, what, view.name, everything)]
    whole_file = sha256(content) == entry.sha256
    faults: list[Fault] = []
    try:
        index = parse_index(content[len(content) - layout.index_bytes :], len(content), layout, rows)
    except DamagedCacheError as error:
        return [Fault(entry.path, str(error), view.name, everything)]
    for position, (offset, length) in enumerate(index):
        chunk = content[offset : offset + length]
        try:
            without_checksum(chunk)
            check_frame(chunk, layout)
        except DamagedCacheError as error:
            spoilt = everything if layout.column.whole else (first + position, first + position)
            faults.append(Fault(entry.path, str(error), view.name, spoilt))
    if not whole_file and not faults:
        faults.append(Fault(entry.path, "sha256 does not match: another shard's content", view.name, everything))
    return faults


def _notes(path: Path, manifest: Manifest, listed: dict[View, dict[str, FileEntry]]) -> Iterator[str]:
    """Yield a line for each file that nothing lists."""
    for leftover in find_leftovers(path):
        yield f"{leftover.relative_to(path)}: left behind by a writer that died; the next extraction deletes it"
    known = {entry.path for files in listed.values() for entry in files.values()}
    known |= {shards_path(view) for view in manifest.views} | {NAME, ROOT, DATA, LOCK}
    known |= {teacher_path(name, len(array.shape)) for name, array in manifest.arrays.items()}
    views = {view.name for view in manifest.views}
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            relative = Path(folder, name).relative_to(path)
            if relative.as_posix() in known or name == ROOT or name.startswith(TEMPORARY):
                continue
            if relative.parts[0] == "units" and relative.stem.rsplit("-", 1)[0] in views:
                continue
            yield f"{relative.as_posix()}: no manifest lists this file"
