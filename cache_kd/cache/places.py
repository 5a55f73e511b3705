"""In: what the user calls a cache. Out: its place, and the store of the files there."""

from __future__ import annotations

from pathlib import Path

from cache_kd.cache.folder_store import FolderStore
from cache_kd.cache.store import Place, Store, Url


def open_store(place: Place | str | Store) -> Store:
    """Return the store of the files at `place`, which need not be there yet; a store is returned as it is."""
    if isinstance(place, str):
        return FolderStore(Path(place))
    if isinstance(place, Path):
        return FolderStore(place)
    if isinstance(place, Url):
        raise NotImplementedError(place)
    return place
