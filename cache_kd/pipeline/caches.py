"""In: a folder of caches, or caches by name. Out: a table of them, or their removal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_kd.cache.find import FoundCache, find_caches
from cache_kd.cache.last_use import last_use
from cache_kd.cache.manifest import NAME, read_root
from cache_kd.cache.places import open_store
from cache_kd.cache.removal import CacheRemoval, folder_bytes
from cache_kd.cache.store import Place
from cache_kd.errors import CacheKDError, MissingFileError, SettingError
from cache_kd.pipeline.locations import caches_folder
from cache_kd.pipeline.sizes import duration, megabytes


@dataclass(frozen=True)
class Listed:
    """One cache of a folder. What an unfinished or damaged one does not tell is None; times are seconds since 1970."""

    path: str
    complete: bool
    problem: str
    bytes: int
    changed: float
    last_use: float | None
    teacher: str | None
    data: str | None
    images: int | None
    views: int | None
    fidelity: str | None


def list_caches(folder: Place | None) -> list[Listed]:
    """Return the caches directly below `folder`, or the default place, the newest first.

    Raises:
        MissingFileError: A folder was named and is not there.
    """
    if folder is not None and open_store(folder).entries() is None:
        raise MissingFileError(f"no folder {folder}; name one that holds caches, or none: {caches_folder()}")
    return [_listed(found) for found in find_caches(folder if folder is not None else caches_folder())]


def _listed(found: FoundCache) -> Listed:
    size, used = folder_bytes(found.path), last_use(found.path)
    manifest = found.manifest
    if manifest is not None:
        teacher, data = manifest.teacher.get("file"), manifest.teacher.get("data")
        fidelity, views = manifest.codec.get("fidelity"), len(manifest.views)
        images: int | None = manifest.num_images
    else:
        teacher, data, views = None, None, None
        fidelity, images = _begun(found.path)
    return Listed(
        path=str(found.path),
        complete=found.complete,
        problem=found.problem,
        bytes=size,
        changed=found.modified,
        last_use=used,
        teacher=str(teacher) if teacher is not None else None,
        data=str(data) if data is not None else None,
        images=images,
        views=views,
        fidelity=str(fidelity) if fidelity is not None else None,
    )


def _begun(path: Place) -> tuple[object, int | None]:
    """Return fidelity and number of images of a cache without a sound manifest, as far as its root group tells."""
    try:
        root = read_root(path)
    except CacheKDError:
        return None, None
    identity, images = root.get("identity"), root.get("num_images")
    codec = identity.get("codec") if isinstance(identity, dict) else None
    fidelity = codec.get("fidelity") if isinstance(codec, dict) else None
    return fidelity, images if type(images) is int else None


def to_json(caches: Sequence[Listed]) -> list[dict[str, Any]]:
    return [asdict(cache) for cache in caches]


def table(caches: Sequence[Listed], folder: Place | None, *, now: float | None = None) -> str:
    """Return the caches as a table for people; ages are counted to `now`."""
    place = folder if folder is not None else caches_folder()
    if not caches:
        return f"no caches in {place}; make one: cache-kd extract --teacher best.pt"
    now = time.time() if now is None else now
    rows = [("cache", "size", "age", "last use", "teacher", "data", "images x views", "fidelity", "state")]
    for cache in caches:
        shape = f"{cache.images or '?'} x {cache.views or '?'}"
        data = Path(cache.data).name if cache.data else "?"
        rows.append(
            (
                Path(cache.path).name,
                megabytes(cache.bytes),
                duration(max(0.0, now - cache.changed)),
                "-" if cache.last_use is None else f"{duration(max(0.0, now - cache.last_use))} ago",
                cache.teacher or "?",
                data,
                shape,
                cache.fidelity or "?",
                "complete" if cache.complete else _state(cache.path),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = megabytes(sum(cache.bytes for cache in caches))
    count = "1 cache" if len(caches) == 1 else f"{len(caches)} caches"
    return "\n".join([*lines, f"{count} in {place}, {total}; delete one: cache-kd rm CACHE"])


def _state(path: str) -> str:
    return "damaged" if open_store(path).exists(NAME) else "unfinished"


def remove(
    paths: Sequence[Place],
    *,
    unfinished: bool = False,
    agreed: Callable[[str], bool],
    say: Callable[[str], None],
) -> list[tuple[Place, int]]:
    """Delete caches and return each with the bytes that it freed; nothing is deleted unless all may be.

    Args:
        unfinished: All of the default place without a manifest too, but for those that are being written.
        agreed: Takes what is about to be deleted, in words; says whether it shall be.

    Raises:
        MissingFileError: One is no cache. CacheKDError: One is being written.
    """
    if not paths and not unfinished:
        raise SettingError("no cache named; name some: cache-kd rm CACHE, or all unfinished ones: --unfinished")
    with ExitStack() as stack:
        removals = [stack.enter_context(CacheRemoval(path)) for path in dict.fromkeys(paths)]
        for found in find_caches(caches_folder()) if unfinished else []:
            if open_store(found.path).exists(NAME) or found.path in paths:
                continue
            try:
                removals.append(stack.enter_context(CacheRemoval(found.path)))
            except CacheKDError as error:
                say(f"left: {error}")
        if not removals:
            say(f"no unfinished cache in {caches_folder()}")
            return []
        sizes = [(removal.path, removal.num_bytes) for removal in removals]
        total = megabytes(sum(size for _, size in sizes))
        named = ", ".join(f"{path} ({megabytes(size)})" for path, size in sizes)
        if not agreed(f"{named}: delete {total}"):
            say("nothing was deleted")
            return []
        return [(removal.path, removal.delete()) for removal in removals]
