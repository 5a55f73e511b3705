"""In: what an extraction knows when it begins. Out: a file in the cache from which anybody can write the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cache_kd.cache.creation import PLAN, Begun
from cache_kd.cache.files import brief, open_seal, parse_json, seal
from cache_kd.cache.layout import FORMAT, MAX_SAMPLES
from cache_kd.cache.manifest import (
    MAX_MANIFEST_BYTES,
    ROOT,
    TeacherArray,
    columns_from_json,
    columns_to_json,
    read_root,
)
from cache_kd.cache.store import Store
from cache_kd.errors import DamagedCacheError, MissingFileError, SettingError
from cache_kd.structures import HeadSpec, View

GIVEN = ("teacher", "head", "codec", "imgsz", "seed", "recipe", "environment")
"""What the manifest says that the cache's own files do not."""


@dataclass(frozen=True)
class Plan:
    """What an extraction is to become.

    Attributes:
        begun: the cache. views: all that it will hold. manifest: `GIVEN` by name. parts: in how many it is made.
    """

    begun: Begun
    views: tuple[View, ...]
    manifest: Mapping[str, Any]
    parts: int

    def content(self) -> bytes:
        """Return what the file holds."""
        head = self.manifest["head"]
        return seal(
            {
                "format": FORMAT,
                "views": [view.name for view in self.views],
                "parts": self.parts,
                "manifest": {**self.manifest, "head": head.to_json() if isinstance(head, HeadSpec) else head},
                "shard_size": self.begun.shard_size,
                "columns": columns_to_json(self.begun.columns),
                "num_images": self.begun.num_images,
                "data_sha256": self.begun.data_sha256,
                "arrays": {n: {**asdict(a), "shape": list(a.shape)} for n, a in self.begun.arrays.items()},
            }
        )


def read_plan(store: Store) -> Plan:
    """Return what the extraction of the cache in `store` is to become.

    Raises:
        MissingFileError: no cache, or nothing is being extracted. DamagedCacheError: it cannot be read.
    """
    root = read_root(store)
    content = store.find(PLAN, MAX_MANIFEST_BYTES)
    if content is None:
        raise MissingFileError(f"{store.place} has no {PLAN}: nothing is being extracted there")
    try:
        data = open_seal(parse_json(content, store.where(PLAN)))
        return _parsed(root, data)
    except (DamagedCacheError, SettingError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCacheError(
            f"{store.where(PLAN)} cannot be read ({brief(error)}); the same `cache-kd extract` writes it again"
        ) from error


def _parsed(root: Mapping[str, Any], data: Mapping[str, Any]) -> Plan:
    if data["format"] != FORMAT or set(data["manifest"]) != set(GIVEN):
        raise DamagedCacheError("not the plan of an extraction")
    if data["columns"] != root["columns"] or data["num_images"] != root["num_images"]:
        raise DamagedCacheError(f"it is not that of the cache in {ROOT}")
    size = data["shard_size"]
    if type(size) is not int or not 1 <= size <= MAX_SAMPLES or type(data["parts"]) is not int or data["parts"] < 1:
        raise DamagedCacheError(f"shard_size {size!r} or parts {data['parts']!r} is out of range")
    arrays = {n: TeacherArray(a["dtype"], tuple(a["shape"]), a["sha256"]) for n, a in data["arrays"].items()}
    begun = Begun(
        dict(root["identity"]),
        columns_from_json(root["columns"]),
        root["num_images"],
        size,
        arrays,
        data["data_sha256"],
    )
    views = tuple(sorted({View.parse(name) for name in data["views"]}))
    return Plan(begun, views, data["manifest"], data["parts"])
