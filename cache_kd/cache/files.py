"""In: bytes and paths. Out: files that are whole or absent, JSON in one spelling, reads that stay inside the cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache_kd.errors import CacheKDError, DamagedCacheError, DiskSpaceError
from cache_kd.fingerprint import canonical_json, digest_json

TEMPORARY = ".tmp-"
SEAL = "checksum"
MAX_DEPTH = 64
# Written as an escape; two of them that make one character are not ours either: we write it as it is.
_HALF = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES)


def parse_json(data: bytes, where: object) -> Any:
    """Return the document in `data`; raises `DamagedCacheError` naming `where` if it is not plain JSON."""
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in data and _HALF.search(data):  # we write characters as they are: a look tells most files apart
            raise ValueError("half of a surrogate pair is no text")
        if _deeper(document, MAX_DEPTH):
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    except (ValueError, RecursionError) as error:
        raise DamagedCacheError(f"{where}: not valid JSON ({brief(error)})") from error
    return document


def brief(text: object, limit: int = 200) -> str:
    """Return `text` cut to `limit` characters: what others wrote must not fill the screen."""
    whole = str(text)
    return whole if len(whole) <= limit else f"{whole[: limit - 1]}…"


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{brief(text)} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{brief(text)} is no finite number")
    return value


def _deeper(document: Any, levels: int) -> bool:
    """Return whether lists and objects in `document` are nested more than `levels` deep."""
    row = [document] if isinstance(document, dict | list) else []
    for _ in range(levels + 1):
        held = (item.values() if type(item) is dict else item for item in row)
        row = [item for items in held for item in items if type(item) is list or type(item) is dict]
        if not row:
            return False
    return True


def seal(content: dict[str, Any]) -> bytes:
    """Return the JSON of `content` with the sha256 of it under "checksum": for files whose hash no other file holds."""
    return canonical_json({**content, SEAL: digest_json(content)})


def open_seal(data: Any) -> dict[str, Any]:
    """Return the content of a parsed sealed file; raises `DamagedCacheError` if any value of it was changed.

    Spaces and line ends outside of strings may differ: the content is the same.
    """
    if not isinstance(data, dict):
        raise DamagedCacheError("not a JSON object")
    content = {name: value for name, value in data.items() if name != SEAL}
    try:
        found = digest_json(content)
    except (ValueError, RecursionError) as error:  # infinities, half surrogates, endless nesting
        raise DamagedCacheError(f"cannot be JSON of ours ({error})") from error
    if data.get(SEAL) != found:
        raise DamagedCacheError(f"its {SEAL} is not that of its content: the file was changed after it was written")
    return content


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def clear_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an operating system's refusal into one line that names `path`."""
    try:
        yield
    except CacheKDError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise DiskSpaceError(
                f"disk full while {doing} {path}; free some space and run the same command again"
            ) from error
        raise CacheKDError(f"cannot go on {doing} {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Create `path` and its parents, each entry synced to disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with clear_errors(path, "creating"):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Publish `data` as `path`: after a crash at any moment the file is the old one or the new one, whole."""
    with clear_errors(path, "writing"):
        temporary = _write_temporary(path, data)
        try:
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def publish(waiting: Path, path: Path) -> None:
    """Make the file `waiting`, which another library wrote beside it, `path`: at every moment that is whole."""
    with clear_errors(path, "writing"):
        descriptor = os.open(waiting, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(waiting, path)
        sync_folder(path.parent)


def create_only(path: Path, data: bytes) -> bool:
    """Publish `data` as `path` unless that exists; returns whether this call created it."""
    with clear_errors(path, "writing"):
        temporary = _write_temporary(path, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Some mounts (FUSE, exFAT) have no hard links; a record torn there is not JSON and its unit is done again.
            if path.exists():
                return False
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    return True


def sweep(folder: Path) -> list[Path]:
    """Delete what writers that died left behind in `folder`; returns the deleted paths. Call it holding the lock."""
    leftovers = find_leftovers(folder)
    for path in leftovers:
        with clear_errors(path, "deleting"):
            path.unlink(missing_ok=True)
    return leftovers


def find_leftovers(folder: Path) -> list[Path]:
    """Return the temporary files below `folder`."""
    return sorted(
        Path(parent, name) for parent, _, names in os.walk(folder) for name in names if name.startswith(TEMPORARY)
    )


def open_inside(root: str, relative: str) -> int:
    """Return a descriptor of the regular file root/relative; `root` is a real path.

    Raises:
        DamagedCacheError: no such file, not a regular file, or a link on the way.
    """
    full = os.path.join(root, relative)
    if os.path.realpath(full) != full:
        raise DamagedCacheError("a symbolic link or a path out of the cache, which is never followed")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(full, flags | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise DamagedCacheError("the file is missing") from error
    except OSError as error:
        raise DamagedCacheError(f"the file cannot be opened: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedCacheError("not a regular file")
    return descriptor


def read_inside(root: str, relative: str, limit: int) -> bytes:
    """Return the content of root/relative, at most `limit` bytes; faults as in `open_inside`."""
    descriptor = open_inside(root, relative)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise DamagedCacheError(f"the file has {size} bytes, at most {limit} are allowed")
        try:
            return file.read(size)
        except OSError as error:
            raise DamagedCacheError(f"the file cannot be read: {error.strerror or error}") from error


def _write_temporary(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # an interrupt too leaves nothing behind
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder to disk, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:  # some network mounts know no fsync of folders
            raise
    finally:
        os.close(descriptor)
