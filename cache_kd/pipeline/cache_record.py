"""In: a cache and the views of it that a run shows. Out: what a run's record says of it."""

from __future__ import annotations

from collections.abc import Iterable

from cache_kd.cache.find import find_caches
from cache_kd.cache.layout import length_name
from cache_kd.cache.store import Place
from cache_kd.errors import CacheKDError
from cache_kd.losses import parse_losses
from cache_kd.pipeline.costs import recorded_seconds
from cache_kd.pipeline.identity import recodings
from cache_kd.pipeline.opened import Cache
from cache_kd.report.record import CacheRecord


def cache_record(path: Place, views: tuple[int | None, int | None] = (None, None)) -> CacheRecord:
    """Return the facts of a cache; `views`: how many mixed and plain ones are shown, None: all.

    A run that shows some views is charged for those: bytes, seconds and teacher passes are those of a cache of so many.
    Seconds of a recoded cache are its own and those of the cache that it comes from, as far as that is still there.
    """
    cache = Cache(path)
    manifest = cache.manifest
    kinds = [view.kind for view in manifest.views]
    mixed, plain = (
        kinds.count(kind) if count is None else count for kind, count in zip(("mixed", "plain"), views, strict=True)
    )
    share = (mixed + plain) / len(kinds)
    seconds = _seconds(cache)
    size = cache.num_bytes
    return CacheRecord(
        path=str(path.resolve()),
        digest=manifest.digest,
        fidelity=cache.codec.fidelity.name,
        views=mixed,
        plain_views=plain,
        pack=cache.packing.spec if cache.packing else None,
        seed=manifest.seed,
        bytes=round(size * share),
        extract_seconds=seconds * share if seconds is not None else None,
        bytes_per_view=size / (len(kinds) * manifest.num_images),
        teacher_forwards=(mixed + plain) * manifest.num_images,
    )


def _seconds(cache: Cache) -> float | None:
    """Return what making a cache took, with what it comes from; None where units tell no seconds."""
    stages, timed = recorded_seconds(cache)
    items = cache.manifest.num_images * len(cache.manifest.views)
    if not timed:
        return None
    own = sum(value for stage, value in stages.items() if stage != "forward") / timed * items
    made = recodings(cache.manifest.identity)
    for source in find_caches(cache.path.parent) if made else ():
        try:
            found = Cache(source.path)
        except CacheKDError:
            continue
        if found.manifest.identity_digest == made[-1]["identity"]:
            before = _seconds(found)
            return None if before is None else own + before
    return None if made else own


def read_bytes(path: Place, losses: Iterable[str]) -> int:
    """Return the bytes that an epoch reads of a cache for these losses, on average over its views."""
    cache = Cache(path)
    specs = parse_losses(list(losses))
    names = {*cache.codec.columns_for(frozenset[str]().union(*(spec.needs for spec in specs)))} if specs else set()
    names |= {column.name for column in cache.packing.columns(cache.codec.imgsz)} if cache.packing else set()
    names |= {length_name(name) for name in names}
    total = sum(
        entry.bytes
        for view in cache.views
        for name, entry in cache.reader.files(view).items()
        if name.split("/")[2] in names
    )
    return round(total / len(cache.views))
