"""In: a cache's place. Out: it is gone, or the line that says why it stays; other files are never touched."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self, final

from cache_kd.cache.creation import discard
from cache_kd.cache.files import sync_folder
from cache_kd.cache.manifest import NAME, load_manifest, read_root
from cache_kd.cache.places import open_store
from cache_kd.cache.store import Lock, Place
from cache_kd.errors import DamagedCacheError, MismatchError, MissingFileError


def folder_bytes(path: Place) -> int:
    """Return the bytes of all regular files below `path`; links are not followed."""
    return sum(size for _, size in open_store(path).files())


@final
class CacheRemoval:
    """Holds the lock of a cache that is to be deleted; get it, ask whoever is to be asked, then `delete`."""

    def __init__(self, path: Place) -> None:
        """Take the lock.

        Raises:
            MissingFileError: no cache at `path`, or a link. CacheKDError: a writer is at work there.
        """
        check_removable(path)
        self.path = path
        self.num_bytes = folder_bytes(path)
        self._store = open_store(path)
        self._lock: Lock = self._store.lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def delete(self) -> int:
        """Delete the cache, the manifest first, so that a kill leaves an unfinished one; returns the bytes freed."""
        self._store.delete(NAME)
        if isinstance(self.path, Path):
            sync_folder(self.path)
        discard(self._store)
        return self.num_bytes - folder_bytes(self.path)


def check_removable(path: Place) -> None:
    """Raise `MissingFileError` unless `path` is itself the folder of a cache, of whatever format, damaged or not."""
    if isinstance(path, Path) and path.is_symlink():
        raise MissingFileError(f"{path} is a link, which is never followed; name the cache's own folder")
    try:
        read_root(path)
    except MismatchError:  # of another format, and a cache
        return
    except DamagedCacheError as error:
        try:
            load_manifest(path)
        except DamagedCacheError:
            raise MissingFileError(
                f"{path}: nothing in it shows that it is a cache ({str(error).split(';')[0]}); if it is, delete it "
                "yourself"
            ) from error
