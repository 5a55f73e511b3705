"""In: a folder. Out: a `Store` of the files in it, published by renaming, synced to disk, links never followed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import final

from cache_kd.cache.files import clear_errors, create_only, make_folder, open_inside, read_inside, sweep, write_atomic
from cache_kd.cache.lock import PartLock, WriterLock, lock_cache, share_cache
from cache_kd.cache.records import FileEntry
from cache_kd.errors import SettingError


@final
class FolderStore:
    """The files of a cache in a folder; may be forked and pickled."""

    parallel = 1
    exclusive = True

    def __init__(self, place: Path) -> None:
        self.place = place
        self._root = os.path.realpath(place)

    def where(self, relative: str) -> str:
        return str(self.place / relative)

    def exists(self, relative: str) -> bool:
        return os.path.lexists(self.place / relative)

    def size(self, relative: str) -> int | None:
        found = self._regular(relative)
        return None if found is None else found.st_size

    def modified(self, relative: str) -> float | None:
        found = self._regular(relative)
        return None if found is None else found.st_mtime

    def _regular(self, relative: str) -> os.stat_result | None:
        try:
            found = os.lstat(self.place / relative)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def find(self, relative: str, limit: int) -> bytes | None:
        return self.read(relative, limit) if self.exists(relative) else None

    def read(self, relative: str, limit: int) -> bytes:
        return read_inside(self._root, relative, limit)

    def open(self, entry: FileEntry) -> int:
        return open_inside(self._root, entry.path)

    def write(self, relative: str, content: bytes) -> None:
        make_folder((self.place / relative).parent)
        write_atomic(self.place / relative, content)

    def create(self, relative: str, content: bytes) -> bool:
        make_folder((self.place / relative).parent)
        return create_only(self.place / relative, content)

    def delete(self, relative: str) -> None:
        with clear_errors(self.place / relative, "deleting"):
            (self.place / relative).unlink(missing_ok=True)

    def delete_below(self, relative: str) -> None:
        path = self.place / relative
        if path.is_symlink() or not path.is_dir():
            self.delete(relative)
            return
        with clear_errors(path, "deleting"):
            shutil.rmtree(path)

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        for folder, _, names in os.walk(self.place / below):
            for name in sorted(names):
                relative = Path(folder, name).relative_to(self.place).as_posix()
                yield relative, self.size(relative) or 0

    def entries(self) -> list[str] | None:
        return sorted(os.listdir(self.place)) if self.place.is_dir() else None

    def begin(self) -> None:
        if self.place.exists() and not self.place.is_dir():
            raise SettingError(f"{self.place} is a file; give a folder for the cache")
        make_folder(self.place)

    def end(self) -> None:
        with clear_errors(self.place, "deleting"):
            if not any(self.place.iterdir()):
                self.place.rmdir()

    def sweep(self) -> None:
        sweep(self.place)

    def lock(self, *, shared: bool = False) -> WriterLock | PartLock:
        return share_cache(self.place) if shared else lock_cache(self.place)
