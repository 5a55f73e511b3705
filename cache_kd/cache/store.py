"""In: nothing. Out: what a cache asks of the place that holds it: whole files by relative path, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cache_kd.cache.records import FileEntry


@dataclass(frozen=True)
class Url:
    """The address of a cache in an object store, such as s3://bucket/prefix; it is joined with "/" as a path is."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, relative: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{relative}")

    def resolve(self) -> Url:
        """Return the address itself: it does not depend on the working directory."""
        return self

    absolute = resolve

    @property
    def name(self) -> str:
        return self.text.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Url:
        return Url(self.text.rstrip("/").rsplit("/", 1)[0])


Place = Path | Url
"""Where a cache is: a folder, or an address in an object store."""


class Lock(Protocol):
    """The right to write a cache, as far as its place can give one."""

    @property
    def is_locked(self) -> bool: ...

    def sign(self) -> None:
        """Give a sign of life; call it with every batch."""
        ...

    def release(self) -> None: ...


class Store(Protocol):
    """The files of one cache; `relative` is a file's path in it, "/" between the parts.

    A file is whole or absent at every moment, to every reader. Links and paths out of the cache are never followed.
    """

    @property
    def place(self) -> Place: ...

    @property
    def parallel(self) -> int:
        """How many calls at once pay: 1 where a call costs little, more where each waits for a server."""
        ...

    @property
    def exclusive(self) -> bool:
        """Whether the lock keeps others out; where it does not, what is there may be another writer's."""
        ...

    def where(self, relative: str) -> str:
        """Return the file's full name, for messages."""
        ...

    def exists(self, relative: str) -> bool:
        """Return whether there is anything of this name, even what `read` refuses."""
        ...

    def size(self, relative: str) -> int | None:
        """Return the bytes of a file; None if there is no regular file of this name."""
        ...

    def modified(self, relative: str) -> float | None:
        """Return the seconds since 1970 of a file's last change; None if there is no regular file of this name."""
        ...

    def find(self, relative: str, limit: int) -> bytes | None:
        """Return the content of a file, at most `limit` bytes; None if there is none; other faults as in `read`."""
        ...

    def read(self, relative: str, limit: int) -> bytes:
        """Return the content of a file; raises `DamagedCacheError` if it is missing, longer, or cannot be read."""
        ...

    def open(self, entry: FileEntry) -> int:
        """Return a descriptor of a local file with the content of this shard file; faults as in `read`.

        Its size is not looked at where nothing had to be copied; the caller does, and closes it.
        """
        ...

    def write(self, relative: str, content: bytes) -> None:
        """Publish `content`: after a crash at any moment the file is the old one or the new one, whole."""
        ...

    def create(self, relative: str, content: bytes) -> bool:
        """Publish `content` unless there is such a file; returns whether this call created it."""
        ...

    def delete(self, relative: str) -> None:
        """Delete a file, or a link itself; there may be none."""
        ...

    def delete_below(self, relative: str) -> None:
        """Delete everything below `relative`, and the folder; a link is deleted, not followed."""
        ...

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Yield (path, bytes) of every file below the folder `below`, by folder and name; links have 0 bytes."""
        ...

    def entries(self) -> list[str] | None:
        """Return the names directly in the place, sorted; None if there is no such place."""
        ...

    def begin(self) -> None:
        """Make the place; raises `SettingError` if nothing can be written there."""
        ...

    def end(self) -> None:
        """Remove the place itself if nothing is left in it."""
        ...

    def sweep(self) -> None:
        """Delete what writers that died left behind; call it holding the lock."""
        ...

    def lock(self, *, shared: bool = False) -> Lock:
        """Return the right to write, alone or `shared` with other parts; raises `CacheKDError` that says who has it."""
        ...
