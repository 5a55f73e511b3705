"""In: a manifest that is well formed on disk. Out: nothing, or all that this program would look for in it in vain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cache_kd.cache.files import brief
from cache_kd.cache.manifest import NAME, Manifest
from cache_kd.cache.store import Place
from cache_kd.codecs import ViewCodec
from cache_kd.errors import CacheKDError, DamagedCacheError
from cache_kd.fingerprint import SourceImage
from cache_kd.structures import PIXEL_HASH, STORES, Column
from cache_kd.views.packing import PixelCodec, packing_from_description

Rule = tuple[Callable[[Any], bool], str]


def _kind(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


TEXT: Rule = (_kind(str), "a text")
TABLE: Rule = (_kind(dict), "an object")
FLAG: Rule = (_kind(bool), "true or false")
COUNT: Rule = (lambda value: type(value) is int and 1 <= value <= 2**20, "a number from 1")
STORE: Rule = (lambda value: isinstance(value, list) and bool(value) and set(map(str, value)) <= {*STORES}, "stores")
RULES: dict[str, Rule] = {
    **dict.fromkeys(("teacher.file", "teacher.file_sha256", "teacher.weights_sha256", "teacher.data"), TEXT),
    **dict.fromkeys(("teacher.augment", "teacher.head", "environment.versions", "identity.versions"), TABLE),
    **dict.fromkeys(("environment.device", "environment.accelerator", "environment.precision"), TEXT),
    **dict.fromkeys(("environment.batch", "environment.threads"), COUNT),
    **dict.fromkeys(("codec.fidelity", "environment.versions.ultralytics"), TEXT),
    "teacher.head.legacy": FLAG,
    "teacher.head.norm_eps": (_kind(float, int, type(None)), "a number"),
    "teacher.head.activation": (_kind(str, type(None)), "a text"),
    "codec.store": STORE,
    "codec.pack.spec": TEXT,
}


def check_contents(manifest: Manifest, path: Place) -> None:
    """Raise `DamagedCacheError` that lists everything in a manifest that is not as an extraction writes it."""
    absent = object()
    faults: list[str] = []
    for key, (test, wanted) in RULES.items():
        section, *names = key.split(".")
        value: Any = getattr(manifest, section)
        for name in names:
            value = value.get(name, absent) if isinstance(value, Mapping) else absent
        if value is absent:
            faults.append(f"{key} is missing")
        elif not test(value):
            faults.append(f"{key} is {brief(repr(value), 40)}; allowed: {wanted}")
    if faults:
        raise DamagedCacheError(f"{path / NAME}: {'; '.join(faults)}; this is no cache of `cache-kd extract`")


def stored_columns(codec: ViewCodec, packing: PixelCodec | None) -> tuple[Column, ...]:
    """Return the columns of every view of a cache: its targets, where it is packed the view itself, the proof."""
    return (*codec.columns, *(packing.columns(codec.imgsz) if packing else ()), PIXEL_HASH)


def checked_codecs(manifest: Manifest, path: Place) -> tuple[ViewCodec, PixelCodec | None]:
    """Return the codecs of a cache's targets and views, None where it keeps no views.

    Raises:
        DamagedCacheError: their columns are not those that the cache holds.
    """
    try:
        codec = ViewCodec.from_description(manifest.codec, manifest.head, manifest.imgsz)
        packing = packing_from_description(manifest.codec["pack"])
        fits = stored_columns(codec, packing) == manifest.columns
    except (CacheKDError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedCacheError(f"{path / NAME}: codec cannot be read: {brief(error)}") from error
    if not fits:
        raise DamagedCacheError(f"{path / NAME}: columns are not those of its codec, head and imgsz")
    return codec, packing


def checked_images(data: Mapping[str, Any], count: int, path: Place) -> tuple[SourceImage, ...]:
    """Return the images that `data.json` lists; raises `DamagedCacheError` unless they are `count` rows of ours."""
    rows, kinds = data.get("images"), [str, int, str, str]
    if not isinstance(rows, list) or len(rows) != count:
        found = len(rows) if isinstance(rows, list) else "no"
        raise DamagedCacheError(f"{path / 'data.json'}: {found} images are listed, the manifest says {count}")
    for index, row in enumerate(rows):
        if not isinstance(row, list) or [type(value) for value in row] != kinds:
            raise DamagedCacheError(f"{path / 'data.json'}: image {index} is {brief(repr(row), 60)}, no row of ours")
    return tuple(SourceImage(*row) for row in rows)
