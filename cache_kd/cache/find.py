"""In: a folder of caches. Out: what caches it holds, finished or not, newest first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache_kd.cache.manifest import NAME, ROOT, Manifest, read_manifest
from cache_kd.errors import CacheKDError


@dataclass(frozen=True)
class FoundCache:
    """A cache's folder; its manifest if it is complete and sound, else in `problem` the line that says why not.

    Attributes:
        modified: seconds since 1970 of the last change of the manifest (of the root group while there is none).
    """

    path: Path
    manifest: Manifest | None
    problem: str
    modified: float

    @property
    def complete(self) -> bool:
        return self.manifest is not None


def find_caches(folder: Path) -> list[FoundCache]:
    """Return the caches directly below `folder`, the newest first; none if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [_look(path) for path in sorted(folder.iterdir()) if (path / ROOT).is_file()]
    return sorted(found, key=lambda cache: (-cache.modified, cache.path.name))


def _look(path: Path) -> FoundCache:
    dated = path / NAME if (path / NAME).is_file() else path / ROOT
    modified = dated.stat().st_mtime
    try:
        return FoundCache(path, read_manifest(path), "", modified)
    except CacheKDError as error:
        return FoundCache(path, None, str(error), modified)
