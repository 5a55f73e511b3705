"""In: what the user named, or nothing. Out: the cache's folder: the default place, or the newest complete one."""

from __future__ import annotations

import os
from pathlib import Path

from cache_kd.cache.find import find_caches
from cache_kd.errors import MissingFileError

DEFAULT_FOLDER = "kd_cache"


def caches_folder() -> Path:
    """Return the folder of caches: `CACHE_KD_CACHE`, else `kd_cache` under the working directory."""
    return Path(os.environ.get("CACHE_KD_CACHE") or DEFAULT_FOLDER)


def default_cache_path(name: str) -> Path:
    """Return where a new cache of this name goes."""
    return caches_folder() / name


def newest_cache() -> tuple[Path, int]:
    """Return the newest complete cache of the default place and how many complete ones there are.

    Raises:
        MissingFileError: There is none; an unfinished one is named.
    """
    found = find_caches(caches_folder())
    complete = [cache for cache in found if cache.complete]
    if complete:
        return complete[0].path, len(complete)
    if found:
        raise MissingFileError(f"no complete cache in {caches_folder()}; {found[0].path}: {found[0].problem}")
    raise MissingFileError(
        f"no cache in {caches_folder().resolve()}; make one: cache-kd extract --teacher best.pt, or name one: --cache"
    )
