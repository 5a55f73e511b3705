"""In: a complete cache. Out: what it took to make and what reading it takes, as `cache-kd estimate` foresees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cache_kd.cache.listing import read_record, unit_numbers
from cache_kd.errors import DamagedCacheError
from cache_kd.pipeline.default_losses import arrays_read, default_losses
from cache_kd.pipeline.forecast import RATE, break_even
from cache_kd.pipeline.opened import Cache

MOST_RECORDS = 1000
"""Records of units that are read at most: of a larger cache some, evenly spread. In a bucket each is a request."""


def costs(cache: Cache, bytes_by_column: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures that the units recorded; None for those that they do not tell.

    Keys: `seconds` by stage and in all, of the `items_timed` items of `items` whose units were asked and told;
    `items_per_second`;
    `read_bytes` of a view and `read_bytes_per_second` at `images_per_second`; `break_even` in epochs.
    """
    manifest = cache.manifest
    items = manifest.num_images * len(manifest.views)
    seconds, timed = recorded_seconds(cache)
    total = sum(value for stage, value in seconds.items() if stage != "forward")
    read = sum(bytes_by_column.get(name, 0) for name in arrays_read(cache.codec, cache.packing)) / items
    forward = seconds.get("forward", 0.0)
    return {
        "seconds": {**seconds, "total": total} if timed else None,
        "items_timed": timed,
        "items": items,
        "items_per_second": timed / total if total else None,
        "losses": list(default_losses(cache.codec.store, manifest.head)),
        "read_bytes": read,
        "images_per_second": RATE,
        "read_bytes_per_second": read * RATE,
        "break_even": break_even(total / timed * items, manifest.num_images, forward / timed) if timed else None,
    }


def recorded_seconds(cache: Cache) -> tuple[dict[str, float], int]:
    """Return the seconds of units by stage, and how many items they are of: those whose record is whole.

    They are of all units, or of `MOST_RECORDS` at most.
    """
    manifest = cache.manifest
    units = [(view, shard) for view in manifest.views for shard in unit_numbers(manifest)]
    seconds: dict[str, float] = {}
    timed = 0
    for view, shard in units[:: -(-len(units) // MOST_RECORDS)]:
        try:
            record = read_record(cache.reader.store, cache.reader.layouts, view, shard)
        except DamagedCacheError:
            continue
        for stage, value in record.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        first = shard * manifest.shard_size
        timed += min(manifest.shard_size, manifest.num_images - first) if record.seconds else 0
    return seconds, timed


def lines(found: Mapping[str, Any], images: int) -> list[str]:
    """Return the figures as lines for people."""
    read = f"{found['read_bytes'] / 1e3:.1f} kB a view for {', '.join(found['losses'])}"
    rate = f"{found['read_bytes_per_second'] / 1e6:.1f} MB/s at {found['images_per_second']:.0f} images/s"
    if found["seconds"] is None:
        return [f"  reading   {read}, {rate}", "  took      not recorded"]
    whole = found["items"] / found["items_timed"]
    seconds = {stage: value * whole for stage, value in found["seconds"].items()}
    inside = f" with {seconds['forward']:.1f} of the forward pass" if "forward" in seconds else ""
    stages = ", ".join(
        f"{stage} {value:.1f}{inside if stage == 'targets' else ''}"
        for stage, value in seconds.items()
        if stage not in {"total", "forward"}
    )
    told = "" if whole == 1 else f", by {found['items_timed']} of {found['items']} views"
    even = found["break_even"]
    gain = "" if even is None else f"; break-even after {even:.1f} student-epochs of {images} images"
    return [
        f"  reading   {read}, {rate}",
        f"  took      {seconds['total']:.1f} s ({stages}){told}, {found['items_per_second']:.1f} views/s{gain}",
    ]
