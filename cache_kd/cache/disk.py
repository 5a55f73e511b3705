"""In: the place of a cache, there or not. Out: how fast it is written, how much is free; nothing is left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from cache_kd.cache.files import TEMPORARY, clear_errors
from cache_kd.cache.places import open_store
from cache_kd.cache.store import Place, Store

PROBE_BYTES = 16 * 2**20
OBJECT_BYTES = 4 * 2**20


def free_bytes(path: Place) -> int | None:
    """Return the free bytes of the disk that `path` is on, or will be on; None in an object store, which has no end."""
    return shutil.disk_usage(existing_parent(path)).free if isinstance(path, Path) else None


def write_rate(path: Place) -> float:
    """Return the bytes a second at which the disk of `path` takes and syncs a file of noise, or a store an object.

    The file has no name where the system knows such files, so that not even a kill leaves it behind.

    Raises:
        DiskSpaceError, CacheKDError: the disk is full, or writing is not allowed there.
    """
    if not isinstance(path, Path):
        return _upload_rate(open_store(path))
    parent = existing_parent(path)
    count = max(4096, min(PROBE_BYTES, shutil.disk_usage(parent).free // 4))
    noise = os.urandom(count)
    with clear_errors(parent, "probing the disk of"), tempfile.TemporaryFile(dir=parent) as file:
        started = time.perf_counter()
        file.write(noise)
        file.flush()
        os.fsync(file.fileno())
        return count / (time.perf_counter() - started)


def _upload_rate(store: Store) -> float:
    name, noise = f"{TEMPORARY}probe-{os.urandom(8).hex()}", os.urandom(OBJECT_BYTES)
    started = time.perf_counter()
    try:
        store.write(name, noise)
        return OBJECT_BYTES / (time.perf_counter() - started)
    finally:
        store.delete(name)


def existing_parent(path: Path) -> Path:
    """Return the innermost folder on the way to `path` that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
