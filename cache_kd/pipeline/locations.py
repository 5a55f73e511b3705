"""In: what the user named, or nothing. Out: the cache's folder: the default place, or the newest complete one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_kd.cache.find import find_caches
from cache_kd.cache.manifest import ROOT, read_root
from cache_kd.errors import CacheKDError, MissingFileError
from cache_kd.fingerprint import canonical_json, digest_json

DEFAULT_FOLDER = "kd_cache"


def caches_folder() -> Path:
    """Return the folder of caches: `CACHE_KD_CACHE`, else `kd_cache` under the working directory."""
    return Path(os.environ.get("CACHE_KD_CACHE") or DEFAULT_FOLDER)


def default_cache_path(name: str, identity: Mapping[str, Any]) -> Path:
    """Return the folder `<name>-<identity8>` for a cache, or the one in which it is already, under whatever name.

    Data file, teacher and folder may have been renamed since: what a cache is, its identity says.
    """
    wanted = canonical_json(identity)
    path = caches_folder() / f"{name}-{digest_json(identity)[:8]}"
    for candidate in [path, *sorted(folder.parent for folder in caches_folder().glob(f"*/{ROOT}"))]:
        try:
            if canonical_json(read_root(candidate).get("identity")) == wanted:
                return candidate
        except CacheKDError:  # another format, or no cache
            continue
    return path


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
