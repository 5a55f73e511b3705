"""In: the faults of a cache, and where its content was made again. Out: the lost files as they were."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from cache_kd.cache.creation import DATA
from cache_kd.cache.files import make_folder, sha256, write_atomic
from cache_kd.cache.folder_store import FolderStore
from cache_kd.cache.layout import CHECKSUM, layouts, teacher_path
from cache_kd.cache.listing import listed_files, metadata_files, read_record, recorded_files, unit_numbers
from cache_kd.cache.manifest import NAME, Manifest, data_limit, load_manifest, read_root, root_attributes
from cache_kd.cache.records import FileEntry, record_path, shards_json, shards_path
from cache_kd.errors import DamagedCacheError, MismatchError
from cache_kd.fingerprint import canonical_json, differences, listed
from cache_kd.structures import View

_LISTED = 8


@dataclass(frozen=True)
class Lost:
    """What is damaged, by what it takes to put it back.

    Attributes:
        own: content that the cache itself still tells, by path. sources: files that data set and teacher tell.
        units: damaged files of each (view, shard), the record among them.
    """

    own: Mapping[str, bytes]
    sources: frozenset[str]
    units: Mapping[tuple[View, int], frozenset[str]]

    @property
    def needs_teacher(self) -> bool:
        return bool(self.sources or self.units)


@final
class CacheRepair:
    """Holds a damaged cache's lock and replaces single files, only ever by the bytes that its manifest vouches for.

    So at every moment each file is as damaged as it was or exactly what it used to be, and a repair that is interrupted
    is gone on with by repairing again.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock. Raises `DamagedCacheError` without a sound manifest, `CacheKDError` if a writer is at work."""
        self.path = path
        self.manifest: Manifest = load_manifest(path)
        self._layouts = layouts(self.manifest.columns, self.manifest.num_images, self.manifest.shard_size)
        self._root = os.path.realpath(path)
        self._store = FolderStore(path)
        self._lock = self._store.lock()
        self._store.sweep()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def lost(self, files: Iterable[str]) -> Lost:
        """Return what it takes to put back the damaged `files`.

        Raises:
            DamagedCacheError: something that nothing left in the cache describes.
        """
        open_files, own = {*files}, {}
        for path, content in metadata_files(self.manifest, self._layouts).items():
            if path in open_files:
                own[path] = canonical_json(content)
        for view in self.manifest.views:
            if shards_path(view) in open_files:
                own[shards_path(view)] = shards_json(view, self._entries(view).values())
        arrays = {teacher_path(name, len(array.shape)) for name, array in self.manifest.arrays.items()}
        sources = frozenset(open_files & {DATA, *arrays})
        units = {}
        for view in self.manifest.views:
            for shard in unit_numbers(self.manifest):
                paths = {layout.shard_path(view, shard) for layout in self._layouts.values()}
                if damaged := open_files & {*paths, record_path(view, shard)}:
                    units[view, shard] = frozenset(damaged)
        if unknown := sorted(open_files - {*own, *sources, *(path for unit in units.values() for path in unit)}):
            raise DamagedCacheError(
                f"{self.path / unknown[0]} cannot be repaired; run the same `cache-kd extract` again"
            )
        return Lost(own, sources, units)

    def environment(self, view: View, shard: int) -> dict[str, Any]:
        """Return with what a unit was made: as its record says, else as another of the cache does."""
        for number in (shard, *unit_numbers(self.manifest)):
            try:
                return read_record(self._store, self._layouts, view, number).environment
            except DamagedCacheError:
                continue
        return self.manifest.environment

    def check_source(self, source: Path) -> None:
        """Raise `MismatchError` unless the cache begun at `source` is of the same teacher, data and settings."""
        manifest, found = self.manifest, read_root(source)
        there = root_attributes(manifest.identity, manifest.columns, manifest.num_images)
        named = differences(there["identity"], found["identity"]) or differences(there, found)
        if named:
            raise MismatchError(
                f"{self.path} cannot be repaired with these: {listed(named)}; give the teacher, the data set and the "
                "library versions that it was extracted with; nothing was changed"
            )

    def put_own(self, lost: Lost) -> None:
        """Write what the cache itself tells."""
        for path, content in lost.own.items():
            self._put(path, content)

    def take_sources(self, lost: Lost, source: Path) -> None:
        """Copy `data.json` and the teacher's arrays from the cache begun at `source` if they are what they were."""
        hashes, limits = {DATA: self.manifest.data_sha256}, {DATA: data_limit(self.manifest.num_images)}
        for name, array in self.manifest.arrays.items():
            path = teacher_path(name, len(array.shape))
            hashes[path], limits[path] = array.sha256, array.num_bytes + CHECKSUM
        for path in sorted(lost.sources):
            content = FolderStore(source).read(path, limits[path])
            if sha256(content) != hashes[path]:
                raise MismatchError(
                    f"{self.path / path}: made again it differs from what the manifest vouches for"
                    + ("; were images renamed? " if path == DATA else "; ")
                    + "the damaged file is left as it is"
                )
            self._put(path, content)

    def take_unit(self, lost: Lost, source: Path, view: View, shard: int) -> None:
        """Copy the damaged files of a unit from the cache at `source`, where it was made again.

        Raises:
            MismatchError: any file of the unit has other bytes there; nothing of it is copied.
        """
        self._lock.sign()
        entries = self._entries(view)
        made = FolderStore(source)
        record = read_record(made, self._layouts, view, shard)
        if differing := sorted(entry.path for entry in record.files if entry != entries[entry.path]):
            raise MismatchError(f"{view.name} shard {shard}: made again, {', '.join(differing[:_LISTED])} differ")
        damaged = lost.units[view, shard]
        for path in sorted(damaged - {record_path(view, shard)}):
            self._put(path, made.read(path, entries[path].bytes))
        if record_path(view, shard) in damaged:
            self._put(record_path(view, shard), record.content())

    def _entries(self, view: View) -> dict[str, FileEntry]:
        try:
            return listed_files(self._store, self.manifest, self._layouts, view)
        except DamagedCacheError as error:
            if recorded := recorded_files(self._store, self.manifest, self._layouts, view):
                return recorded
            raise DamagedCacheError(
                f"{self.path / shards_path(view)}: {error}, and the unit records do not tell either what it listed; "
                f"run the same `cache-kd extract` again, it makes the damaged units and {NAME} anew"
            ) from error

    def _put(self, path: str, content: bytes) -> None:
        folder = Path(self._root, path).parent
        if os.path.realpath(folder) != str(folder):
            raise DamagedCacheError(f"{folder} is a symbolic link, which is never followed; remove it and repair again")
        make_folder(folder)
        write_atomic(folder / Path(path).name, content)
