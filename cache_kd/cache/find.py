"""In: a place that holds caches. Out: what caches it holds, finished or not, newest first."""

from __future__ import annotations

from dataclasses import dataclass

from cache_kd.cache.manifest import NAME, ROOT, Manifest, read_manifest
from cache_kd.cache.places import open_store
from cache_kd.cache.store import Place, Store
from cache_kd.errors import CacheKDError


@dataclass(frozen=True)
class FoundCache:
    """A cache's place; its manifest if it is complete and sound, else in `problem` the line that says why not.

    Attributes:
        modified: seconds since 1970 of the last change of the manifest (of the root group while there is none).
    """

    path: Place
    manifest: Manifest | None
    problem: str
    modified: float

    @property
    def complete(self) -> bool:
        return self.manifest is not None


def find_caches(folder: Place) -> list[FoundCache]:
    """Return the caches directly below `folder`, the newest first; none if there is no such place."""
    found = [_look(open_store(folder / name)) for name in open_store(folder).entries() or ()]
    return sorted((cache for cache in found if cache), key=lambda cache: (-cache.modified, cache.path.name))


def _look(store: Store) -> FoundCache | None:
    root = store.modified(ROOT)
    if root is None:
        return None
    modified = store.modified(NAME) or root
    try:
        return FoundCache(store.place, read_manifest(store), "", modified)
    except CacheKDError as error:
        return FoundCache(store.place, None, str(error), modified)
