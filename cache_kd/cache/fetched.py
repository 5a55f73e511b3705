"""In: shards of caches elsewhere. Out: local copies named by their sha256, bounded in bytes, shared by processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from filelock import FileLock

from cache_kd.cache.files import TEMPORARY, clear_errors, make_folder
from cache_kd.errors import DiskSpaceError

STALE_SECONDS = 3600.0
_LOCKS = 64


@final
class FetchFolder:
    """A folder of files named after their sha256: a file that is there has been checked.

    The least recently opened ones go when room is needed. Every process on the machine may use it at once: one fetches
    a file, the others wait for it; what is open stays readable when it is deleted.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit

    def path(self, digest: str) -> Path:
        """Return where the file of this sha256 is, or will be."""
        return self.folder / digest[:2] / digest

    def open(self, digest: str) -> int | None:
        """Return a descriptor of a file and note that it was used; None if it is not there."""
        path = self.path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            return None
        if time.time() - os.fstat(descriptor).st_mtime > 1.0:
            _touch(path)
        return descriptor

    def keep(self, digest: str) -> None:
        """Note that the file will be used, if it is there."""
        _touch(self.path(digest))

    def fetch(self, digest: str, size: int, download: Callable[[Callable[[bytes], Any]], None]) -> str:
        """Return the path of the file, which `download` writes to what it is given, checked, unless it is there.

        Raises:
            DiskSpaceError: the file alone is over the limit, or the disk is full.
        """
        path = self.path(digest)
        make_folder(self.folder / ".locks")
        with clear_errors(path, "fetching"), FileLock(self.folder / ".locks" / f"{int(digest[:4], 16) % _LOCKS}.lock"):
            if path.exists():
                _touch(path)
                return str(path)
            make_folder(path.parent)
            temporary = path.with_name(f"{TEMPORARY}{digest}-{os.getpid()}")
            try:
                with temporary.open("wb") as file:
                    self._reserve(size, file.fileno(), str(temporary))
                    download(file.write)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return str(path)

    def _reserve(self, size: int, descriptor: int, own: str) -> None:
        """Delete the least recently opened files until `size` more bytes fit, and take that room with an open file."""
        if size > self.limit:
            raise DiskSpaceError(
                f"{self.folder} may hold {self.limit} bytes and a shard has {size}; give a larger --fetch-limit"
            )
        with FileLock(self.folder / ".locks" / "room.lock"):
            held = sorted(self._held(own))
            over = sum(found[1] for found in held) + size - self.limit
            for _, there, path in held:
                if over > 0 and not Path(path).name.startswith(TEMPORARY):
                    Path(path).unlink(missing_ok=True)
                    over -= there
            os.truncate(descriptor, size)  # for the others who count

    def _held(self, own: str) -> list[tuple[float, int, str]]:
        """Return (last use, bytes, path) of every file; those of a process that died are deleted."""
        found = []
        for part in os.scandir(self.folder):
            if not part.is_dir() or part.name.startswith("."):
                continue
            for entry in os.scandir(part):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if entry.name.startswith(TEMPORARY) and time.time() - status.st_mtime > STALE_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
                elif entry.path != own:
                    found.append((status.st_mtime, status.st_size, entry.path))
        return found


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except FileNotFoundError:  # evicted meanwhile
        return
