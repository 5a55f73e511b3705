"""In: a cache's folder. Out: a report of every fault: missing, cut, changed, foreign files, by view and samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from cache_kd.cache.attempts import ATTEMPTS
from cache_kd.cache.creation import DATA, PLAN
from cache_kd.cache.files import TEMPORARY, parse_json, sha256
from cache_kd.cache.last_use import LAST_USE
from cache_kd.cache.layout import CHECKSUM, check_metadata, check_with_zarr, layouts, teacher_path
from cache_kd.cache.listing import (
    Layouts,
    listed_files,
    metadata_files,
    read_hashed,
    read_record,
    recorded_files,
    unit_numbers,
)
from cache_kd.cache.lock import HOLDER, is_lock_file
from cache_kd.cache.manifest import (
    MAX_JSON_BYTES,
    NAME,
    ROOT,
    Manifest,
    content_digest,
    data_limit,
    load_manifest,
    read_manifest,
)
from cache_kd.cache.places import open_store
from cache_kd.cache.records import FileEntry, record_path, shards_path
from cache_kd.cache.shard import without_checksum
from cache_kd.cache.shard_faults import Fault, ShardFile, shard_faults, size_faults
from cache_kd.cache.store import Place, Store
from cache_kd.errors import CacheKDError, DamagedCacheError
from cache_kd.structures import View

Progress = Callable[[int, int], None]
Listed = dict[View, dict[str, FileEntry]]


@dataclass(frozen=True)
class VerifyReport:
    """What verification found: shard files and bytes read, faults, notes that spoil nothing (files nobody listed).

    Of `left_out` more shard files only presence and size were looked at.
    """

    path: Place
    files: int
    bytes: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    left_out: int = 0

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "ok": self.ok,
            "files": self.files,
            "bytes": self.bytes,
            "left_out": self.left_out,
            "faults": [asdict(fault) for fault in self.faults],
            "notes": list(self.notes),
        }


def verify_cache(
    place: Place, *, jobs: int = 1, fraction: float = 1.0, seed: int = 0, progress: Progress | None = None
) -> VerifyReport:
    """Read the complete cache at `place` from end to end and return everything that is wrong with it.

    Args:
        jobs: threads that read and hash shard files.
        fraction: share of the shard files to read, chosen by `seed`; of the others only presence and size are looked
            at. Everything that is no shard is always read.
        progress: called with (bytes read, bytes in all) after each shard file.

    Raises:
        MissingFileError: no cache there. MismatchError: another format. DamagedCacheError: unfinished, or a manifest
            that cannot be read, without which nothing else means anything.
    """
    store = open_store(place)
    manifest, faults = _manifest(store)
    every = layouts(manifest.columns, manifest.num_images, manifest.shard_size)
    for file, expected in metadata_files(manifest, every).items():
        if file != ROOT or not faults:
            faults += _metadata_faults(store, file, expected)
    faults += [*_data_faults(store, manifest), *_teacher_faults(store, manifest)]
    listed, list_faults = _listed(store, manifest, every)
    faults += [*list_faults, *_record_faults(store, manifest, every, listed)]
    files = _shard_files(listed, every)
    chosen = _chosen(len(files), fraction, seed)
    faults += _all_shard_faults(store, files, chosen, jobs, progress)
    if len(listed) == len(manifest.views):
        entries = [(file.entry.path, file.entry.sha256) for file in files]
        if content_digest(manifest.identity, entries) != manifest.digest:
            faults.append(Fault(NAME, "digest is not that of the listed files and the identity"))
    seen = sum(files[number].entry.bytes for number in chosen)
    notes = tuple(_notes(store, manifest, listed))
    return VerifyReport(store.place, len(chosen), seen, tuple(faults), notes, len(files) - len(chosen))


def _manifest(store: Store) -> tuple[Manifest, list[Fault]]:
    """Return the manifest, and as a fault what is wrong with the root group: the manifest tells all that it does."""
    try:
        return read_manifest(store), []
    except CacheKDError as error:
        if not store.exists(NAME):
            raise
        found = load_manifest(store)
        return found, [Fault(ROOT, str(error).removeprefix(store.where(ROOT)).lstrip(": ").split("; `cache-kd")[0])]


def _metadata_faults(store: Store, path: str, expected: dict[str, Any]) -> list[Fault]:
    """Return what is wrong with a `zarr.json`, as the manifest and, of an array, as zarr-python see it."""
    try:
        content = store.read(path, MAX_JSON_BYTES)
        check_metadata(parse_json(content, path), expected, path)
        if expected["node_type"] == "array":
            check_with_zarr(content, expected)
    except DamagedCacheError as error:
        return [Fault(path, str(error).removeprefix(f"{path}: "))]
    return []


def _data_faults(store: Store, manifest: Manifest) -> list[Fault]:
    try:
        read_hashed(store, DATA, manifest.data_sha256, data_limit(manifest.num_images))
    except DamagedCacheError as error:
        return [Fault(DATA, str(error))]
    return []


def _teacher_faults(store: Store, manifest: Manifest) -> list[Fault]:
    faults: list[Fault] = []
    for name, array in manifest.arrays.items():
        path = teacher_path(name, len(array.shape))
        try:
            content = store.read(path, array.num_bytes + CHECKSUM)
            if sha256(content) != array.sha256:
                raise DamagedCacheError("sha256 does not match the manifest")
            without_checksum(content)
        except DamagedCacheError as error:
            faults.append(Fault(path, str(error)))
    return faults


def _listed(store: Store, manifest: Manifest, every: Layouts) -> tuple[Listed, list[Fault]]:
    """Return the shard files of each view that can be known, and the lists that are damaged."""
    listed: Listed = {}
    faults: list[Fault] = []
    for view in manifest.views:
        try:
            listed[view] = listed_files(store, manifest, every, view)
        except DamagedCacheError as error:
            faults.append(Fault(shards_path(view), str(error), view.name, (0, manifest.num_images - 1)))
            if recorded := recorded_files(store, manifest, every, view):
                listed[view] = recorded
    return listed, faults


def _record_faults(store: Store, manifest: Manifest, every: Layouts, listed: Listed) -> Iterator[Fault]:
    """Yield the unit records that are lost or wrong: training does not read them, the next extraction does."""
    for view in listed:  # of others nothing shows that there are as many units as the manifest declares
        for shard in unit_numbers(manifest):
            first = shard * manifest.shard_size
            samples = (first, min(first + manifest.shard_size, manifest.num_images) - 1)
            try:
                record = read_record(store, every, view, shard)
                if any(listed[view][entry.path] != entry for entry in record.files):
                    raise DamagedCacheError(f"it lists other files than {shards_path(view)}")
            except DamagedCacheError as error:
                yield Fault(record_path(view, shard), str(error), view.name, samples)


def _shard_files(listed: Listed, every: Layouts) -> list[ShardFile]:
    return [
        ShardFile(view, layout, shard, files[layout.shard_path(view, shard)])
        for view, files in listed.items()
        for layout in every.values()
        for shard in range(layout.num_shards)
    ]


def _chosen(count: int, fraction: float, seed: int) -> Sequence[int]:
    """Return the numbers of the files to read, ascending; at least one."""
    if fraction >= 1 or not count:
        return range(count)
    return sorted(random.Random(seed).sample(range(count), max(1, round(count * fraction))))


def _all_shard_faults(
    store: Store, files: list[ShardFile], chosen: Sequence[int], jobs: int, progress: Progress | None
) -> list[Fault]:
    """Return the faults of all shard files in their order; those not chosen are only measured."""
    wanted = set(chosen)
    total = sum(files[number].entry.bytes for number in wanted)
    seen = 0
    faults: list[Fault] = []

    def look(number: int) -> list[Fault]:
        return shard_faults(store, files[number]) if number in wanted else size_faults(store, files[number])

    pool = ThreadPoolExecutor(jobs)
    try:
        for number, found in enumerate(pool.map(look, range(len(files)))):
            faults += found
            if number in wanted:
                seen += files[number].entry.bytes
                if progress:
                    progress(seen, total)
    finally:  # an interrupt waits for the files in work, not for all the others
        pool.shutdown(cancel_futures=True)
    return faults


def _notes(store: Store, manifest: Manifest, listed: Listed) -> Iterator[str]:
    """Yield a line for each file that nothing lists."""
    files = [path for path, _ in store.files()]
    for path in sorted(files):
        if _name(path).startswith(TEMPORARY):
            yield f"{path}: left behind by a writer that died; the next extraction deletes it"
    if store.exists(HOLDER):
        yield f"{HOLDER}: a writer is at work, or one died; the next extraction replaces it"
    known = {entry.path for files in listed.values() for entry in files.values()}
    known |= {shards_path(view) for view in manifest.views} | {NAME, ROOT, DATA, PLAN, LAST_USE}
    known |= {teacher_path(name, len(array.shape)) for name, array in manifest.arrays.items()}
    views = {view.name for view in manifest.views}
    for path in files:
        name = _name(path)
        if path in known or name == ROOT or name.startswith(TEMPORARY) or is_lock_file(path):
            continue
        if path.startswith(f"{ATTEMPTS}/"):  # of views that are being added
            continue
        if path.startswith("units/") and name.removesuffix(".json").rsplit("-", 1)[0] in views:
            continue
        yield f"{path}: no manifest lists this file"


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
