"""In: the place of a cache that is about to be begun. Out: nothing of it, should it end before its first unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_kd.cache.creation import discard
from cache_kd.cache.places import open_store
from cache_kd.cache.store import Place
from cache_kd.errors import CacheKDError


@contextmanager
def nothing_left(path: Place, made: Sequence[Place]) -> Iterator[None]:
    """Remove a cache's files, and the folders made for it, when its first extraction ends before the first unit."""
    try:
        yield
    except (CacheKDError, KeyboardInterrupt):
        with suppress(CacheKDError):  # a store that is out of reach: the next extraction goes on with what is there
            store = open_store(path)
            begun = (name for below in ("units", "attempts") for name, _ in store.files(below))
            if path in made and not any(name.endswith(".json") for name in begun):
                discard(store)
                remove_empty(made[1:])
        raise


def to_be_made(path: Place) -> tuple[Place, ...]:
    """Return the place of a cache and the folders around it that are not there yet, the innermost first."""
    if isinstance(path, Path):
        return tuple(folder for folder in (path, *path.parents) if not folder.exists())
    return ()  # nobody is kept out of a bucket: what lies there may be another extraction's beginning


def remove_empty(folders: Sequence[Place]) -> None:
    """Remove these nested folders, the innermost first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            if isinstance(folder, Path):
                folder.rmdir()
