"""In: a folder, there or not. Out: how fast its disk writes and how much of it is free; nothing is left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from cache_kd.cache.files import clear_errors

PROBE_BYTES = 16 * 2**20


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that `path` is on, or will be on."""
    return shutil.disk_usage(existing_parent(path)).free


def write_rate(path: Path) -> float:
    """Return the bytes a second at which the disk of `path` takes and syncs a file of noise.

    The file has no name where the system knows such files, so that not even a kill leaves it behind.

    Raises:
        DiskSpaceError, CacheKDError: the disk is full, or writing is not allowed there.
    """
    parent = existing_parent(path)
    count = max(4096, min(PROBE_BYTES, free_bytes(parent) // 4))
    noise = os.urandom(count)
    with clear_errors(parent, "probing the disk of"), tempfile.TemporaryFile(dir=parent) as file:
        started = time.perf_counter()
        file.write(noise)
        file.flush()
        os.fsync(file.fileno())
        return count / (time.perf_counter() - started)


def existing_parent(path: Path) -> Path:
    """Return the innermost folder on the way to `path` that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
