"""In: a manifest and the folder it lies in. Out: what else must be there: metadata files, shard files, unit records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cache_kd.cache.files import parse_json, sha256
from cache_kd.cache.layout import ArrayLayout, group_metadata, teacher_metadata
from cache_kd.cache.manifest import MAX_JSON_BYTES, ROOT, Manifest, root_attributes
from cache_kd.cache.records import (
    FileEntry,
    UnitRecord,
    parse_record,
    parse_shards,
    record_path,
    shards_json,
    shards_path,
)
from cache_kd.cache.store import Store
from cache_kd.cache.units import file_entry
from cache_kd.errors import DamagedCacheError
from cache_kd.structures import View

Layouts = Mapping[str, ArrayLayout]


def metadata_files(manifest: Manifest, layouts: Layouts) -> dict[str, dict[str, Any]]:
    """Return what every `zarr.json` of a complete cache declares, by path; that of the root group comes first."""
    attributes = root_attributes(manifest.identity, manifest.columns, manifest.num_images)
    found = {ROOT: group_metadata({"cache_kd": attributes})}
    groups = ["teacher", "views", *(f"views/{view.name}" for view in manifest.views)]
    found.update({f"{group}/{ROOT}": group_metadata({}) for group in groups})
    for name, array in manifest.arrays.items():
        found[f"teacher/{name}/{ROOT}"] = teacher_metadata(array.shape, array.dtype)
    for view in manifest.views:
        found.update({f"{layout.folder(view)}/{ROOT}": layout.metadata() for layout in layouts.values()})
    return found


def read_hashed(store: Store, path: str, digest: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a JSON file whose sha256 the manifest holds; raises `DamagedCacheError`."""
    content = store.read(path, limit)
    if sha256(content) != digest:
        raise DamagedCacheError("sha256 does not match the manifest")
    return content


def listed_files(store: Store, manifest: Manifest, layouts: Layouts, view: View) -> dict[str, FileEntry]:
    """Return the shard files of `view` by path, as its `shards.json` lists them; raises `DamagedCacheError`."""
    content = read_hashed(store, shards_path(view), manifest.shards[view.name])
    return parse_shards(parse_json(content, shards_path(view)), view, layouts)


def recorded_files(store: Store, manifest: Manifest, layouts: Layouts, view: View) -> dict[str, FileEntry] | None:
    """Return what a lost `shards.json` listed, from the records of the units, or None if those do not tell.

    A unit whose record is lost too is taken as its files are; the manifest's sha256 says whether all of it is right.
    """
    found: dict[str, FileEntry] = {}
    try:
        for shard in unit_numbers(manifest):
            found.update({entry.path: entry for entry in _unit_files(store, layouts, view, shard)})
    except DamagedCacheError:
        return None
    return found if sha256(shards_json(view, found.values())) == manifest.shards[view.name] else None


def read_record(store: Store, layouts: Layouts, view: View, shard: int) -> UnitRecord:
    """Return the record of a unit; raises `DamagedCacheError` if it is missing or damaged."""
    path = record_path(view, shard)
    return parse_record(parse_json(store.read(path, MAX_JSON_BYTES), path), view, shard, layouts)


def unit_numbers(manifest: Manifest) -> range:
    """Return the numbers of the shards of a view."""
    return range(-(-manifest.num_images // manifest.shard_size))


def _unit_files(store: Store, layouts: Layouts, view: View, shard: int) -> Iterator[FileEntry]:
    try:
        yield from read_record(store, layouts, view, shard).files
    except DamagedCacheError:
        for layout in layouts.values():
            path = layout.shard_path(view, shard)
            content = store.read(path, layout.num_chunks * (layout.chunk_bytes + 64) + layout.index_bytes)
            yield file_entry(path, content, layout)
