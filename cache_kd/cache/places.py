"""In: what the user calls a cache. Out: its place, and the store of the files there."""

from __future__ import annotations

import re
from pathlib import Path

from cache_kd.cache.folder_store import FolderStore
from cache_kd.cache.object_store import SCHEMES, Fetching, ObjectStore
from cache_kd.cache.store import Place, Store, Url
from cache_kd.errors import SettingError, choices

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")


def parse_place(text: str | Place) -> Place:
    """Return the folder or the URL that `text` names; raises `SettingError` for a scheme that is not known."""
    if not isinstance(text, str):
        return text
    match = _URL.fullmatch(text)
    if match is None:
        return Path(text)
    scheme, rest = match[1].lower(), match[2].strip("/")
    if scheme not in SCHEMES:
        raise SettingError(f"{text}: unknown scheme {scheme!r}; {choices(scheme, SCHEMES)}; or give a folder")
    if not rest or any(part in ("", ".", "..") for part in rest.split("/")):
        raise SettingError(f"{text}: allowed: {scheme}://BUCKET/PREFIX, without empty parts, '.' and '..'")
    return Url(f"{scheme}://{rest}")


def open_store(place: Place | str | Store, fetching: Fetching | None = None) -> Store:
    """Return the store of the files at `place`, which need not be there yet; a store is returned as it is.

    Args:
        fetching: Where shards of an object store are copied to; None: what the environment says.
    """
    if isinstance(place, str):
        place = parse_place(place)
    if isinstance(place, Path):
        return FolderStore(place)
    if isinstance(place, Url):
        return ObjectStore(place, fetching)
    return place
