"""In: a cache that is being used. Out: when it was used last, kept beside the manifest where writing is allowed."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from cache_kd.cache.store import Place

LAST_USE = ".last-use"


def mark_used(path: Place) -> None:
    """Note that the cache at `path` is used now, as the time of an empty file; one that is read-only stays as it is.

    So does one in an object store: many read it from afar, and none of them needs the right to write there.
    """
    if not isinstance(path, Path):
        return
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with contextlib.suppress(OSError):  # nothing depends on it
        descriptor = os.open(path / LAST_USE, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.utime(descriptor if os.utime in os.supports_fd else path / LAST_USE)
        finally:
            os.close(descriptor)


def last_use(path: Place) -> float | None:
    """Return the seconds since 1970 of the last use of the cache at `path`, None if none is known."""
    if not isinstance(path, Path):
        return None
    try:
        found = (path / LAST_USE).lstat()
    except OSError:
        return None
    return found.st_mtime if stat.S_ISREG(found.st_mode) else None
