"""In: what the user named, or nothing. Out: the cache's place: the default place, or the newest complete one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cache_kd.cache.find import find_caches
from cache_kd.cache.manifest import read_root
from cache_kd.cache.places import open_store, parse_place
from cache_kd.cache.store import Place
from cache_kd.errors import CacheKDError, MissingFileError
from cache_kd.fingerprint import canonical_json, digest_json

DEFAULT_FOLDER = "kd_cache"


def caches_folder() -> Place:
    """Return the place of caches: `CACHE_KD_CACHE`, else `kd_cache` under the working directory."""
    return parse_place(os.environ.get("CACHE_KD_CACHE") or DEFAULT_FOLDER)


def default_cache_path(name: str, identity: Mapping[str, Any]) -> Place:
    """Return the place `<name>-<identity8>` for a cache, or the one in which it is already, under whatever name.

    Data file, teacher and folder may have been renamed since: what a cache is, its identity says.
    """
    wanted = canonical_json(identity)
    folder = caches_folder()
    path = folder / f"{name}-{digest_json(identity)[:8]}"
    for candidate in [path, *(folder / entry for entry in open_store(folder).entries() or ())]:
        try:
            if canonical_json(read_root(candidate).get("identity")) == wanted:
                return candidate
        except CacheKDError:  # another format, or no cache
            continue
    return path


def newest_cache() -> tuple[Place, int]:
    """Return the newest complete cache of the default place and how many complete ones there are.

    Raises:
        MissingFileError: There is none; an unfinished one is named.
    """
    folder = caches_folder()
    found = find_caches(folder)
    complete = [cache for cache in found if cache.complete]
    if complete:
        return complete[0].path, len(complete)
    if found:
        raise MissingFileError(f"no complete cache in {folder}; {found[0].path}: {found[0].problem}")
    raise MissingFileError(
        f"no cache in {folder.resolve()}; make one: cache-kd extract --teacher best.pt, or name one: --cache"
    )
