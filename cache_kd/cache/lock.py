"""In: a cache's folder. Out: the right to write it, alone or with other parts, or the line that says who has it."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from cache_kd.cache.files import clear_errors, create_only, parse_json, read_inside, write_atomic
from cache_kd.errors import CacheKDError, DamagedCacheError
from cache_kd.fingerprint import canonical_json

LOCK = ".lock"
HOLDER = ".writer.json"
PART = ".part-"
"""Beginning of the names of the records that writers of parts keep."""
STALE_SECONDS = 600.0
_SIGN_SECONDS = 15.0
_RECORD_SECONDS = 1.0
_MAX_BYTES = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@final
class WriterLock:
    """The right to write one cache; get it from `lock_cache`.

    On one machine the kernel decides: the lock on `.lock` ends with its process, however that dies, so a dead owner's
    lock is taken over at once. Over a network mount that lock may bind each machine alone. So the owner also keeps
    `.writer.json`: machine, process, start, and, as the file's time, its last sign of life, given with every batch.
    Another machine's record is respected for ten minutes after that sign, by the clock of the file system, and then
    taken over: nobody has to delete anything. Should two owners write at once all the same (one that stood still for
    longer than that and woke up), they do the same units: records are created once, and equal input gives equal bytes.
    """

    def __init__(self, path: Path, lock: FileLock, record: bytes) -> None:
        self._path = path
        self._file = path / HOLDER
        self._lock = lock
        self._record = record
        self._signed = time.monotonic()

    @property
    def is_locked(self) -> bool:
        return self._lock.is_locked

    def sign(self) -> None:
        """Give a sign of life, at most every few seconds; call it far oftener than every ten minutes."""
        if self.is_locked and time.monotonic() - self._signed >= _SIGN_SECONDS:
            self._signed = time.monotonic()
            _touch(self._file)

    def release(self) -> None:
        """Let others write. The record goes first, and only if it is still this one's."""
        if not self.is_locked:
            return
        try:
            if _content(self._path) == self._record:
                with clear_errors(self._file, "deleting"):
                    self._file.unlink(missing_ok=True)
        finally:
            self._lock.release()


@final
class PartLock:
    """The right to write a cache beside others who do so; get it from `share_cache`.

    It keeps out those who must be alone: an extraction of the whole, a repair, a removal. Writers of parts are safe
    from each other without it: files are renamed into place, records created once.
    """

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file = file
        self._descriptor: int | None = descriptor
        self._signed = time.monotonic()

    @property
    def is_locked(self) -> bool:
        return self._descriptor is not None

    def sign(self) -> None:
        """Give a sign of life, as `WriterLock.sign`."""
        if self.is_locked and time.monotonic() - self._signed >= _SIGN_SECONDS:
            self._signed = time.monotonic()
            _touch(self._file)

    def release(self) -> None:
        if self._descriptor is None:
            return
        try:
            with clear_errors(self._file, "deleting"):
                self._file.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)
            self._descriptor = None


def lock_cache(path: Path) -> WriterLock:
    """Return the held lock of the one who may write the cache at `path`; raises `CacheKDError` if another has it."""
    lock = FileLock(path / LOCK)
    with clear_errors(path / LOCK, "locking"):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise _refusal(path, _holder(path), "") from error
    try:
        _check_parts(path)
        return WriterLock(path, lock, _record(path))
    except BaseException:
        lock.release()
        raise


def share_cache(path: Path) -> PartLock:
    """Return the held right to write a part of the cache at `path`; raises `CacheKDError` if somebody must be alone."""
    with clear_errors(path / LOCK, "locking"):
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = _read(path)
            if found and found.get("machine") != _machine():
                _respect(path, path / HOLDER, found)
            file = path / f"{PART}{os.getpid()}-{os.urandom(4).hex()}.json"
            write_atomic(file, canonical_json(_self()))
        except BlockingIOError as error:
            os.close(descriptor)
            raise _refusal(path, _holder(path), "") from error
        except BaseException:
            os.close(descriptor)
            raise
    return PartLock(file, descriptor)


def is_lock_file(name: str) -> bool:
    """Return whether a file directly in a cache belongs to its locks."""
    return name in (LOCK, HOLDER) or name.startswith(PART)


def _check_parts(path: Path) -> None:
    """Delete the records of parts whose writers are gone; raises `CacheKDError` if one on another machine is not.

    On this machine there are none: the kernel has just given the lock to one who is alone.
    """
    for file in sorted(path.glob(f"{PART}*.json")):
        found = _read(path, file.name)
        if found.get("machine") != _machine():
            _respect(path, file, found)
        with clear_errors(file, "deleting"):
            file.unlink(missing_ok=True)


def _record(path: Path) -> bytes:
    """Write who holds the lock and return that; raises `CacheKDError` if another machine's record is fresh."""
    file = path / HOLDER
    own = _self()
    content = canonical_json(own)
    if create_only(file, content):
        return content
    found = _read(path)
    if found.get("machine") != own["machine"]:
        _respect(path, file, found)
    write_atomic(file, content)
    return content


def _self() -> dict[str, Any]:
    return {"host": platform.node(), "machine": _machine(), "pid": os.getpid(), "start": _now()}


def _respect(path: Path, file: Path, found: dict[str, Any]) -> None:
    """Raise `CacheKDError` if the writer of another machine that `file` tells of gave a sign of life lately."""
    age = _age(path, file)
    if 0 <= age < STALE_SECONDS:
        rest = f" ({age:.0f} s ago it was at work; silent for {STALE_SECONDS:.0f} s, its lock is taken over)"
        raise _refusal(path, found, rest)


def _holder(path: Path) -> dict[str, Any]:
    """Return the record of who holds the lock; it is written right after the lock is taken, so worth a moment."""
    ends = time.monotonic() + _RECORD_SECONDS
    while True:
        for name in (HOLDER, *sorted(file.name for file in path.glob(f"{PART}*.json"))):
            if found := _read(path, name):
                return found
        if time.monotonic() >= ends:
            return {}
        time.sleep(0.02)


def _refusal(path: Path, holder: dict[str, Any], rest: str) -> CacheKDError:
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('start')},"
    return CacheKDError(
        f"another extraction is writing {path}: {who} has its lock{rest}; wait for it to end, or stop it, and run "
        "this again"
    )


def _machine() -> str:
    """Return what tells this machine's running system from all others: containers on it share its locks."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _age(path: Path, file: Path) -> float:
    """Return the seconds since `file` was touched, both moments by the clock that stamps files there."""
    probe = path / LOCK
    with clear_errors(probe, "touching"):
        os.utime(probe)
        try:
            return probe.stat().st_mtime - file.stat().st_mtime
        except FileNotFoundError:
            return -1.0


def _touch(file: Path) -> None:
    with clear_errors(file, "touching"):
        try:
            os.utime(file)
        except FileNotFoundError:  # another machine took the lock over and is done; what is written stays right
            return


def _content(path: Path, name: str = HOLDER) -> bytes:
    try:
        return read_inside(os.path.realpath(path), name, _MAX_BYTES)
    except DamagedCacheError:
        return b""


def _read(path: Path, name: str = HOLDER) -> dict[str, Any]:
    """Return a record in the cache at `path`; {} if there is none that can be read, which counts as nobody's."""
    try:
        found = parse_json(_content(path, name), path / name)
    except DamagedCacheError:
        return {}
    return found if isinstance(found, dict) else {}
