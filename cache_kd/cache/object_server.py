"""In: requests of other processes over a local socket. Out: what an object store answers; the only user of obstore.

obstore's threads do not survive a fork: forked loaders of a process that uses it hang (obstore 0.12.1, tokio issue
4301). So it lives in this process, which `ObjectStore` starts and which ends with its parent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, Listener
from typing import Any, final
from urllib.parse import urlsplit

from cache_kd.cache.fetched import FetchFolder
from cache_kd.cache.object_process import PREFIXES
from cache_kd.errors import CacheKDError, DamagedCacheError, DiskSpaceError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
METADATA_SERVER = "169.254.169.254"
Environment = tuple[tuple[str, str], ...]
Reach = tuple[str, Environment, float]
"""A URL, the variables with `PREFIXES` by which it is reached, and the seconds for which a request is repeated."""

_CHUNK = 4 * 2**20


class Unreachable(Exception):
    """The store cannot be used, and why: "bucket", "credentials" or "other"."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text


@final
class ObjectServer:
    """Does what it is asked with one object store a `Reach`; safe for several threads."""

    def __init__(self) -> None:
        self._stores: dict[Reach, Any] = {}
        self._folders: dict[tuple[str, int], FetchFolder] = {}
        self._lock = threading.Lock()

    def get(self, reach: Reach, key: str, limit: int) -> bytes | int | None:
        """Return the content of an object; its bytes where that are more than `limit`; None if there is none."""
        import obstore

        try:
            with told_apart():
                found = obstore.get(self._store(reach), key)
                size = int(found.meta["size"])
                return bytes(found.bytes()) if size <= limit else size
        except FileNotFoundError:
            return None

    def head(self, reach: Reach, key: str) -> tuple[int, float] | None:
        """Return the bytes of an object and the seconds since 1970 of its last change; None if there is none."""
        import obstore

        try:
            with told_apart():
                found = obstore.head(self._store(reach), key)
                return int(found["size"]), found["last_modified"].timestamp()
        except FileNotFoundError:
            return None

    def put(self, reach: Reach, key: str, content: bytes, create: bool) -> bool:
        """Write an object, with `create` only a new one; returns whether it was written."""
        import obstore

        store = self._store(reach)
        try:
            with told_apart():
                obstore.put(store, key, content, mode="create" if create else "overwrite", use_multipart=False)
        except obstore.exceptions.AlreadyExistsError:
            # A lost answer is asked for again: the object that is there may be the one just written.
            return _own(content) and self.get(reach, key, len(content)) == content
        except FileNotFoundError as error:
            raise Unreachable("bucket", _short(error)) from error
        return True

    def creates(self, reach: Reach) -> bool:
        """Return whether the store honours create-only writes, by trying twice with a probe that is deleted again."""
        import obstore

        store, key = self._store(reach), f".tmp-probe-{os.urandom(8).hex()}"
        try:
            with told_apart():
                obstore.put(store, key, b"1", mode="create", use_multipart=False)
                obstore.put(store, key, b"2", mode="create", use_multipart=False)
        except obstore.exceptions.AlreadyExistsError:
            return True
        except (NotImplementedError, obstore.exceptions.NotSupportedError):
            return False
        except FileNotFoundError as error:
            raise Unreachable("bucket", _short(error)) from error
        finally:
            self.delete(reach, [key])
        return False

    def delete(self, reach: Reach, keys: list[str]) -> None:
        """Delete objects; there may be none of these names."""
        import obstore

        try:
            with told_apart():
                obstore.delete(self._store(reach), keys)
        except FileNotFoundError:
            return

    def files(self, reach: Reach, below: str) -> list[tuple[str, int]]:
        """Return (key, bytes) of every object below a prefix, by name."""
        import obstore

        try:
            with told_apart():
                pages = obstore.list(self._store(reach), prefix=below or None)
                return sorted((str(item["path"]), int(item["size"])) for page in pages for item in page)
        except FileNotFoundError as error:
            raise Unreachable("bucket", _short(error)) from error

    def entries(self, reach: Reach) -> list[str]:
        """Return the names of objects and folders directly below the URL, by name."""
        import obstore

        try:
            with told_apart():
                found = obstore.list_with_delimiter(self._store(reach))
        except FileNotFoundError as error:
            raise Unreachable("bucket", _short(error)) from error
        names = [str(prefix).rstrip("/") for prefix in found["common_prefixes"]]
        return sorted({name.rsplit("/", 1)[-1] for name in [*names, *(str(item["path"]) for item in found["objects"])]})

    def fetch(self, reach: Reach, key: str, size: int, digest: str, folder: str, limit: int) -> str:
        """Return the path of a local copy of an object that has these bytes and this sha256, made unless it is there.

        Raises:
            DamagedCacheError: the object is missing or another one.
        """
        with self._lock:
            local = self._folders.setdefault((folder, limit), FetchFolder(folder, limit))
        return local.fetch(digest, size, lambda write: self._download(reach, key, size, digest, write))

    def _download(self, reach: Reach, key: str, size: int, digest: str, write: Callable[[bytes], Any]) -> None:
        import obstore

        hashed, seen = hashlib.sha256(), 0
        try:
            with told_apart():
                found = obstore.get(self._store(reach), key)
                if (there := int(found.meta["size"])) != size:
                    raise DamagedCacheError(f"the object has {there} bytes, shards.json says {size}")
                for part in found.stream(min_chunk_size=_CHUNK):
                    data = bytes(part)
                    hashed.update(data)
                    write(data)
                    seen += len(data)
        except FileNotFoundError as error:
            raise DamagedCacheError("the object is missing") from error
        if seen != size or hashed.hexdigest() != digest:
            raise DamagedCacheError("the object's sha256 is not the one in shards.json: it was changed or is another")

    def _store(self, reach: Reach) -> Any:
        with self._lock:
            if reach not in self._stores:
                self._stores[reach] = connect(*reach)
            return self._stores[reach]


def _own(content: bytes) -> bool:
    """Return whether equal bytes prove who wrote them: a unit's record says where and how fast it was made."""
    return b'"seconds"' in content


def connect(url: str, environment: Environment, retry_seconds: float) -> Any:
    """Return obstore's store of a URL; credentials, region and endpoint are those of the environment that asks."""
    from obstore.store import from_url

    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        del os.environ[name]
    os.environ.update(environment)
    allowed = any(urlsplit(os.environ.get(name, "")).hostname in LOOPBACK for name in ENDPOINTS)
    options: Any = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=10)}
    if allowed or urlsplit(url).scheme == "http":
        options["allow_http"] = True
    backoff = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2}
    retry: Any = {"max_retries": 10_000, "retry_timeout": timedelta(seconds=retry_seconds), "backoff": backoff}
    config: Any = None
    if url.startswith("s3://"):
        config = {"disable_bulk_delete": True}  # not all servers know it, and few objects are ever deleted
        if endpoint := os.environ.get(ENDPOINTS[1]):  # the one name of the AWS tools that obstore does not know
            config["endpoint"] = endpoint
    try:
        return from_url(url, client_options=options, retry_config=retry, config=config)
    except Exception as error:  # of many kinds; each says what of the address or the environment cannot be
        raise Unreachable("credentials", _short(error)) from error


class told_apart:
    """Turns obstore's refusals into `Unreachable`, but for what its callers expect."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from obstore import exceptions

        if error is None or not isinstance(error, (exceptions.BaseError, FileNotFoundError, ValueError)):
            return
        if isinstance(error, (CacheKDError, exceptions.AlreadyExistsError)):
            return
        text = str(error)
        if "NoSuchBucket" in text or "ContainerNotFound" in text:
            raise Unreachable("bucket", _short(error)) from error
        if isinstance(error, FileNotFoundError):
            return
        denied = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if isinstance(error, denied) or METADATA_SERVER in text or "InvalidAccessKeyId" in text:
            raise Unreachable("credentials", _short(error)) from error
        raise Unreachable("other", _short(error)) from error


def _short(error: BaseException) -> str:
    """Return what happened without obstore's debug text and the server's page."""
    text = str(error).split("\n\nDebug source")[0]
    return " ".join(text.split("<?xml")[0].split())[:300].rstrip(" :")


def serve(address: str, server: ObjectServer) -> None:
    """Answer requests until the parent is gone."""
    with Listener(address, "AF_UNIX", backlog=64) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            threading.Thread(target=_answer, args=(listener.accept(), server), daemon=True).start()


def _answer(connection: Connection, server: ObjectServer) -> None:
    with connection:
        while True:
            try:
                name, arguments = connection.recv()
            except (EOFError, OSError):
                return
            for reply in _replies(server, name, arguments):
                connection.send(reply)


def _replies(server: ObjectServer, name: str, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    try:
        yield "ok", getattr(server, name)(*arguments)
    except Unreachable as error:
        yield error.kind, error.text
    except DamagedCacheError as error:
        yield "damaged", str(error)
    except DiskSpaceError as error:
        yield "full", str(error)
    except Exception as error:  # it belongs to whoever asked, who says it in one line
        yield "other", f"{type(error).__name__}: {_short(error)}"


def _end_with(parent: int, address: str) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(os.path.dirname(address), ignore_errors=True)
    os._exit(0)


def main() -> None:
    """Serve as the parent says in a line of JSON on the standard input."""
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(int(told["parent"]), told["address"]), daemon=True).start()
    try:
        import obstore  # noqa: F401  # here, so that the parent hears of its absence before it asks for anything
    except ImportError:
        sys.stdout.write("absent\n")
        return
    serve(told["address"], ObjectServer())


if __name__ == "__main__":
    main()
