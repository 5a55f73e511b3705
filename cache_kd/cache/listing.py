"""In: a manifest and the folder it lies in. Out: what else must be there: metadata files, shard files, unit records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cache_kd.cache.files import parse_json, read_inside, sha256
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


def read_hashed(root: str, path: str, digest: str) -> bytes:
    """Return the content of a JSON file whose sha256 the manifest holds; raises `DamagedCacheError`."""
    content = read_inside(root, path, MAX_JSON_BYTES)
    if sha256(content) != digest:
        raise DamagedCacheError("sha256 does not match the manifest")
    return content


def listed_files(root: str, manifest: Manifest, layouts: Layouts, view: View) -> dict[str, FileEntry]:
    """Return the shard files of `view` by path, as its `shards.json` lists them; raises `DamagedCacheError`."""
    content = read_hashed(root, shards_path(view), manifest.shards[view.name])
    return parse_shards(parse_json(content, Path(shards_path(view))), view, layouts)


def recorded_files(root: str, manifest: Manifest, layouts: Layouts, view: View) -> dict[str, FileEntry] | None:
    """Return what a lost `shards.json` listed, from the records of the units, or None if those do not tell.

    A unit whose record is lost too is taken as its files are; the manifest's sha256 says whether all of it is right.
    """
    found: dict[str, FileEntry] = {}
    try:
        for shard in unit_numbers(manifest):
            found.update({entry.path: entry for entry in _unit_files(root, layouts, view, shard)})
    except DamagedCacheError:
        return None
    return found if sha256(shards_json(view, found.values())) == manifest.shards[view.name] else None


def read_record(root: str, layouts: Layouts, view: View, shard: int) -> UnitRecord:
    """Return the record of a unit; raises `DamagedCacheError` if it is missing or damaged."""
    path = record_path(view, shard)
    return parse_record(parse_json(read_inside(root, path, MAX_JSON_BYTES), Path(path)), view, shard, layouts)


def unit_numbers(manifest: Manifest) -> range:
    """Return the numbers of the shards of a view."""
    return range(-(-manifest.num_images // manifest.shard_size))


def _unit_files(root: str, layouts: Layouts, view: View, shard: int) -> Iterator[FileEntry]:
    try:
        yield from read_record(root, layouts, view, shard).files
    except DamagedCacheError:
        for layout in layouts.values():
            path = layout.shard_path(view, shard)
            content = read_inside(root, path, layout.num_chunks * (layout.chunk_bytes + 64) + layout.index_bytes)
            yield file_entry(path, content, layout)
