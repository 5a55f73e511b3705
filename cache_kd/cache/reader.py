"""In: (view, index, columns). Out: rows of a complete cache, each byte checked, at a few microseconds a read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from cache_kd.cache.files import parse_json, sha256
from cache_kd.cache.layout import CHECKSUM, ArrayLayout, check_metadata, layouts, length_name, teacher_path
from cache_kd.cache.manifest import MAX_JSON_BYTES, data_limit, read_manifest
from cache_kd.cache.places import open_store
from cache_kd.cache.records import FileEntry, parse_shards, shards_path
from cache_kd.cache.shard import Index, read_chunk, read_index, without_checksum
from cache_kd.cache.store import Place, Store
from cache_kd.errors import DamagedCacheError, SettingError, choices
from cache_kd.structures import View

MAX_OPEN = 64
MAX_BLOCK_BYTES = 64 * 2**20
MAX_LISTED = 200_000
"""Shard files, about 700 bytes each, whose lists are kept at a time; the list of one view is kept however long."""
_METADATA_BYTES = 2**16


@dataclass(frozen=True)
class _OpenShard:
    descriptor: int
    index: Index


class _ProcessState:
    """What one process has open; never shared, so that forked readers cannot disturb one another."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.lists_lock = threading.Lock()  # taken last
        self.shards: OrderedDict[tuple[View, str, int], _OpenShard] = OrderedDict()
        self.blocks: OrderedDict[tuple[View, str, int], np.ndarray] = OrderedDict()
        self.block_bytes = 0
        self.described: set[tuple[View, str]] = set()

    def close(self) -> None:
        for shard in self.shards.values():
            os.close(shard.descriptor)
        self.shards.clear()
        self.blocks.clear()
        self.block_bytes = 0

    def __del__(self) -> None:
        self.close()


@final
class CacheReader:
    """Reads a complete cache; safe to fork, to pickle and to use from several threads."""

    def __init__(self, place: Place | str | Store) -> None:
        self.store = open_store(place)
        self.manifest = read_manifest(self.store)
        self._begin()

    def _begin(self) -> None:
        self.layouts = layouts(self.manifest.columns, self.manifest.num_images, self.manifest.shard_size)
        self._files: dict[View, dict[str, FileEntry]] = {}
        self._state = _ProcessState()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def path(self) -> Place:
        """Where the cache is."""
        return self.store.place

    def close(self) -> None:
        """Close all files of this process; reading opens them again."""
        with self._here().lock:
            self._here().close()

    def __len__(self) -> int:
        return self.manifest.num_images

    @property
    def num_bytes(self) -> int:
        """Bytes of all shard files of all views."""
        return sum(entry.bytes for view in self.manifest.views for entry in self.files(view).values())

    def read(self, view: View, index: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the rows of one sample by column name; ragged ones have their own length."""
        return {column: self.read_row(view, column, index) for column in columns}

    def read_row(self, view: View, column: str, index: int) -> np.ndarray:
        """Return one sample's row of `column`, a new array of the column's shape; a ragged one is cut to its length.

        Raises:
            SettingError: no such view, column or index. DamagedCacheError: a file is gone or fails its checks.
        """
        layout = self.layouts.get(column)
        if layout is None:
            raise SettingError(f"{self.path} has no column {column!r}; {choices(column, self.layouts)}")
        if not 0 <= index < layout.num_images:
            raise SettingError(f"{self.path}: no sample {index}; allowed: 0 to {layout.num_images - 1}")
        state = self._here()
        shard, position = divmod(index, layout.samples)
        with state.lock:
            try:
                row = self._row(state, view, layout, shard, position)
            except (DamagedCacheError, OSError) as error:
                raise self._damage(layout.shard_path(view, shard), view, index, error) from error
        if not layout.column.ragged:
            return row
        length = int(self.read_row(view, length_name(column), index))
        if length > len(row):
            fault = f"length {length} of a row of at most {len(row)}"
            path = self.layouts[length_name(column)].shard_path(view, shard)
            raise self._damage(path, view, index, DamagedCacheError(fault))
        return row[:length]

    def read_teacher(self, name: str) -> np.ndarray:
        """Return the teacher's array `name`; faults as in `read_row`."""
        array = self.manifest.arrays.get(name)
        if array is None:
            raise SettingError(f"{self.path} has no teacher array {name!r}; {choices(name, self.manifest.arrays)}")
        relative = teacher_path(name, len(array.shape))
        try:
            content = self.store.read(relative, array.num_bytes + CHECKSUM)
            body = without_checksum(content)
            if sha256(content) != array.sha256 or len(body) != array.num_bytes:
                raise DamagedCacheError("sha256 does not match the manifest")
        except DamagedCacheError as error:
            raise DamagedCacheError(
                f"{self.store.where(relative)}: {error}; run `cache-kd verify {self.path}`"
            ) from error
        return body.view(np.dtype(array.dtype).newbyteorder("<")).reshape(array.shape).copy()

    def read_data(self) -> dict[str, Any]:
        """Return the content of `data.json`, the ordered images."""
        return dict(self._read_json("data.json", self.manifest.data_sha256, data_limit(len(self))))

    def files(self, view: View) -> dict[str, FileEntry]:
        """Return the shard files of `view` by path in the cache; lists of large caches are read again when needed."""
        with self._here().lists_lock:
            found = self._files.pop(view, None)
            found = self._files[view] = self._listed(view) if found is None else found  # now the latest
            while len(self._files) > 1 and sum(map(len, self._files.values())) > MAX_LISTED:
                del self._files[next(iter(self._files))]
        return found

    def _listed(self, view: View) -> dict[str, FileEntry]:
        if view not in self.manifest.views:
            names = [known.name for known in self.manifest.views]
            raise SettingError(f"{self.path} has no view {view.name}; {choices(view.name, names)}")
        content = self._read_json(shards_path(view), self.manifest.shards[view.name])
        try:
            return parse_shards(content, view, self.layouts)
        except DamagedCacheError as error:
            where = self.store.where(shards_path(view))
            raise DamagedCacheError(f"{where}: {error}; run `cache-kd verify {self.path}`") from error

    def _here(self) -> _ProcessState:
        if self._state.pid != os.getpid():
            self._state = _ProcessState()
        return self._state

    def _read_json(self, relative: str, digest: str, limit: int = MAX_JSON_BYTES) -> Any:
        try:
            content = self.store.read(relative, limit)
            if sha256(content) != digest:
                raise DamagedCacheError("sha256 does not match the manifest")
        except DamagedCacheError as error:
            raise DamagedCacheError(
                f"{self.store.where(relative)}: {error}; run `cache-kd verify {self.path}`"
            ) from error
        return parse_json(content, self.store.where(relative))

    def _damage(self, relative: str, view: View, index: int, error: Exception) -> DamagedCacheError:
        where = f"{self.store.where(relative)}: {error} (view {view.name}, sample {index})"
        return DamagedCacheError(f"{where}; run `cache-kd verify {self.path}`")

    def _row(self, state: _ProcessState, view: View, layout: ArrayLayout, shard: int, position: int) -> np.ndarray:
        if layout.column.whole:
            return np.array(self._block(state, view, layout, shard)[position])
        opened = self._shard(state, view, layout, shard)
        chunk: np.ndarray = read_chunk(opened.descriptor, opened.index[position], layout)
        return chunk.reshape(layout.column.shape)

    def _block(self, state: _ProcessState, view: View, layout: ArrayLayout, shard: int) -> np.ndarray:
        """Return the decoded only chunk of a shard, kept while there is room."""
        key = (view, layout.column.name, shard)
        block = state.blocks.get(key)
        if block is not None:
            state.blocks.move_to_end(key)
            return block
        opened = self._shard(state, view, layout, shard)
        block = read_chunk(opened.descriptor, opened.index[0], layout)
        state.blocks[key] = block
        state.block_bytes += block.nbytes
        while state.block_bytes > MAX_BLOCK_BYTES and len(state.blocks) > 1:
            state.block_bytes -= state.blocks.popitem(last=False)[1].nbytes
        return block

    def _shard(self, state: _ProcessState, view: View, layout: ArrayLayout, shard: int) -> _OpenShard:
        """Return the open shard file with its index; at most `MAX_OPEN` stay open."""
        key = (view, layout.column.name, shard)
        opened = state.shards.get(key)
        if opened is not None:
            state.shards.move_to_end(key)
            return opened
        entry = self.files(view)[layout.shard_path(view, shard)]
        self._describe(state, view, layout)
        descriptor = self.store.open(entry)
        try:
            size = os.fstat(descriptor).st_size
            if size != entry.bytes:
                raise DamagedCacheError(f"the file has {size} bytes, shards.json says {entry.bytes}")
            opened = _OpenShard(descriptor, read_index(descriptor, size, layout, layout.rows(shard), entry.tail))
        except BaseException:
            os.close(descriptor)
            raise
        state.shards[key] = opened
        while len(state.shards) > MAX_OPEN:
            os.close(state.shards.popitem(last=False)[1].descriptor)
        return opened

    def _describe(self, state: _ProcessState, view: View, layout: ArrayLayout) -> None:
        """Check once that the array's `zarr.json` declares what the manifest does."""
        if (view, layout.column.name) in state.described:
            return
        relative = f"{layout.folder(view)}/zarr.json"
        where = self.store.where(relative)
        try:
            content = self.store.read(relative, _METADATA_BYTES)
        except DamagedCacheError as error:
            raise DamagedCacheError(f"{where}: {error}") from error
        check_metadata(parse_json(content, where), layout.metadata(), where)
        state.described.add((view, layout.column.name))
