"""In: the URL of a cache in an object store. Out: a `Store` of its objects; shards are read from checked copies."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from cache_kd.cache.fetched import FetchFolder
from cache_kd.cache.object_process import OBJECTS, retry_seconds
from cache_kd.cache.records import FileEntry
from cache_kd.cache.store import Place, Url
from cache_kd.config import parse_size
from cache_kd.errors import CacheKDError, DamagedCacheError, DiskSpaceError, MissingFileError, SettingError

SCHEMES = ("s3", "gs", "az", "http", "https")
READ_ONLY = ("http", "https")
FOLDER = "CACHE_KD_FETCH_FOLDER"
LIMIT = "CACHE_KD_FETCH_LIMIT"
DEFAULT_FOLDER = Path("kd_cache", ".fetched")
DEFAULT_LIMIT = "50GB"
_TRIES = 5
_SECRETS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN, AWS_REGION; AWS_SKIP_SIGNATURE=true for a "
    "public bucket)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN)",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetching:
    """Where shards of object stores are copied to, and how many bytes of them are kept there."""

    folder: Path
    limit: int

    @classmethod
    def from_environment(cls, limit: int | None = None) -> Fetching:
        """Return the folder and limit of `CACHE_KD_FETCH_FOLDER` and `CACHE_KD_FETCH_LIMIT`, such as 50GB."""
        if limit is None:
            limit = parse_size(os.environ.get(LIMIT) or DEFAULT_LIMIT, LIMIT)
        return cls(Path(os.environ.get(FOLDER) or DEFAULT_FOLDER).absolute(), limit)


class NoLock:
    """The right to write where nobody can be kept out: units are recorded once, whoever does them."""

    def __init__(self) -> None:
        self.is_locked = True

    def sign(self) -> None:
        """Do nothing: nobody looks."""

    def release(self) -> None:
        self.is_locked = False


@final
class ObjectStore:
    """The objects of a cache below a URL; may be forked, pickled and used from several threads.

    All requests go through one process a parent, see `object_server`.
    """

    parallel = 16
    exclusive = False

    def __init__(self, place: Url, fetching: Fetching | None = None) -> None:
        self.place: Place = place
        self._url = str(place).rstrip("/")
        self._scheme = self._url.split("://")[0]
        self.fetching = fetching or Fetching.from_environment()
        self._copies = FetchFolder(self.fetching.folder, self.fetching.limit)
        self._listed: dict[str, dict[str, int]] = {}
        self._creates = True

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.place, self.fetching)

    def where(self, relative: str) -> str:
        return f"{self._url}/{relative}"

    def exists(self, relative: str) -> bool:
        return self._head(relative) is not None

    def size(self, relative: str) -> int | None:
        """Return an object's bytes; those of shards come from one listing of their folder, while that has them."""
        folder = "/".join(relative.split("/")[:4])
        if not folder.startswith("views/") or folder == relative or self._scheme in READ_ONLY:
            return self._head(relative)
        if folder not in self._listed:
            self._listed[folder] = dict(self.files(folder))
        found = self._listed[folder].get(relative)
        return self._head(relative) if found is None else found

    def modified(self, relative: str) -> float | None:
        found = self._ask("head", relative)
        return None if found is None else float(found[1])

    def find(self, relative: str, limit: int) -> bytes | None:
        found = self._ask("get", relative, limit)
        if isinstance(found, int):
            raise DamagedCacheError(f"the object has {found} bytes, at most {limit} are allowed")
        return None if found is None else bytes(found)

    def read(self, relative: str, limit: int) -> bytes:
        found = self.find(relative, limit)
        if found is None:
            raise DamagedCacheError("the object is missing")
        return found

    def open(self, entry: FileEntry) -> int:
        for _ in range(_TRIES):  # another process may need the room between fetching and opening
            descriptor = self._copies.open(entry.sha256)
            if descriptor is not None:
                return descriptor
            self.fetch(entry)
        raise DiskSpaceError(
            f"{self._copies.folder}: shards are deleted faster than they are read; give a larger --fetch-limit than "
            f"{self._copies.limit} bytes"
        )

    def fetch(self, entry: FileEntry) -> None:
        """Copy a shard into the local folder, checked, unless it is there; faults as in `read`."""
        folder, limit = self._copies.folder, self._copies.limit
        self._ask("fetch", entry.path, entry.bytes, entry.sha256, str(folder), limit)

    def keep(self, entry: FileEntry) -> None:
        """Delete the local copy of a shard, if there is one, after those that were used before."""
        self._copies.keep(entry.sha256)

    def write(self, relative: str, content: bytes) -> None:
        self._ask("put", relative, content, False)
        self._forget(relative)

    def create(self, relative: str, content: bytes) -> bool:
        if not self._creates and self.exists(relative):
            return False
        self._forget(relative)
        return bool(self._ask("put", relative, content, self._creates))

    def delete(self, relative: str) -> None:
        self._ask("delete", [relative])
        self._forget(relative)

    def delete_below(self, relative: str) -> None:
        self._ask("delete", [path for path, _ in self.files(relative)])
        self._listed.clear()

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        if self._scheme in READ_ONLY:
            return  # plain web servers list nothing
        yield from self._ask("files", below)

    def entries(self) -> list[str] | None:
        if self._scheme in READ_ONLY:
            return None
        return list(self._ask("entries")) or None

    def begin(self) -> None:
        if self._scheme in READ_ONLY:
            raise SettingError(f"{self._url}: {self._scheme} is read-only; write to s3://, gs:// or az://, or a folder")
        self._creates = self._ask("creates")
        if not self._creates:
            _log.warning(
                "%s: this server ignores create-only writes; let one extraction at a time write here: two at once may "
                "each record a unit, and where their bytes differ training refuses that unit's shards",
                self._url,
            )

    def end(self) -> None:
        """Do nothing: a prefix without objects is gone."""

    def sweep(self) -> None:
        """Do nothing: an object is written whole or not at all."""

    def lock(self, *, shared: bool = False) -> NoLock:
        return NoLock()

    def _head(self, relative: str) -> int | None:
        found = self._ask("head", relative)
        return None if found is None else int(found[0])

    def _forget(self, relative: str) -> None:
        self._listed.pop("/".join(relative.split("/")[:4]), None)

    def _ask(self, name: str, *arguments: Any) -> Any:
        status, answer = OBJECTS.ask(name, self._url, arguments)
        if status == "ok":
            return answer
        if status == "damaged":
            raise DamagedCacheError(answer)
        if status == "full":
            raise DiskSpaceError(answer)
        raise self._refused(status, answer)

    def _refused(self, kind: str, text: str) -> CacheKDError:
        bucket = "/".join(self._url.split("/")[:3])
        if kind == "bucket":
            return MissingFileError(f"{bucket}: there is no such bucket ({text}); create it, or name another --cache")
        if kind == "credentials":
            needed = _SECRETS.get(self._scheme, "a server that answers without them")
            return CacheKDError(f"{bucket}: the credentials are refused or absent ({text}); set {needed}")
        return CacheKDError(
            f"{self._url}: the object store cannot be used, after trying for {retry_seconds():.0f} s ({text}); check "
            f"the address, AWS_ENDPOINT_URL and the network, and run the same command again, it goes on where it was"
        )
