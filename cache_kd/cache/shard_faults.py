"""In: a shard file as it should be. Out: what is wrong with the one on disk, down to the samples that it spoils."""

from __future__ import annotations

from dataclasses import dataclass

from cache_kd.cache.files import sha256
from cache_kd.cache.layout import ArrayLayout
from cache_kd.cache.records import FileEntry, shards_path
from cache_kd.cache.shard import check_frame, parse_index, without_checksum
from cache_kd.cache.store import Store
from cache_kd.errors import DamagedCacheError
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
class ShardFile:
    """A shard file as it should be."""

    view: View
    layout: ArrayLayout
    shard: int
    entry: FileEntry

    @property
    def samples(self) -> tuple[int, int]:
        """The first and the last one."""
        first = self.shard * self.layout.samples
        return first, first + self.layout.rows(self.shard) - 1


def size_faults(store: Store, file: ShardFile) -> list[Fault]:
    """Return what is wrong with presence and size of a shard file; its content is not read."""
    size = store.size(file.entry.path)
    if size is None:
        what = "not a regular file" if store.exists(file.entry.path) else "the file is missing"
        return [Fault(file.entry.path, what, file.view.name, file.samples)]
    return _wrong_size(file, size)


def _wrong_size(file: ShardFile, size: int) -> list[Fault]:
    if size == file.entry.bytes:
        return []
    what = f"{size} bytes, {shards_path(file.view)} says {file.entry.bytes}"
    return [Fault(file.entry.path, what, file.view.name, file.samples)]


def shard_faults(store: Store, file: ShardFile) -> list[Fault]:
    """Return the faults of one shard file: of the file as a whole, then of each chunk whose bytes fail."""
    entry, layout, view, everything = file.entry, file.layout, file.view, file.samples
    try:
        content = store.read(entry.path, entry.bytes)
        if wrong := _wrong_size(file, len(content)):
            return wrong
        index = parse_index(content[len(content) - layout.index_bytes :], len(content), layout, layout.rows(file.shard))
    except DamagedCacheError as error:
        return [Fault(entry.path, str(error), view.name, everything)]
    faults: list[Fault] = []
    parts = memoryview(content)  # a copy of each chunk would keep the other threads waiting
    for position, (offset, length) in enumerate(index):
        chunk = parts[offset : offset + length]
        try:
            without_checksum(chunk)
            check_frame(chunk, layout)
        except DamagedCacheError as error:
            spoilt = everything if layout.column.whole else (everything[0] + position, everything[0] + position)
            faults.append(Fault(entry.path, str(error), view.name, spoilt))
    if not faults and sha256(content) != entry.sha256:
        faults.append(Fault(entry.path, "sha256 does not match: another shard's content", view.name, everything))
    return faults
