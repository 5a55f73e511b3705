"""In: arms. Out: what each run took, with its share of the extraction of its cache, which is paid once."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cache_kd.report.comparison import Arm
from cache_kd.report.reading import Run
from cache_kd.report.record import CacheRecord

CACHED = "cached"
CacheKey = tuple[str, int, int]


def _key(cache: CacheRecord) -> CacheKey:
    """Return what a run is charged for: so many views of a cache cost what a cache of so many costs."""
    return cache.digest, cache.views, cache.plain_views


@dataclass(frozen=True)
class CacheUse:
    """A cache, or some views of one, and how many runs trained from it; each bears the same share of its extraction."""

    cache: CacheRecord
    runs: int

    @property
    def share_seconds(self) -> float | None:
        return None if self.cache.extract_seconds is None else self.cache.extract_seconds / self.runs


@dataclass(frozen=True)
class ArmCost:
    """Means over the runs of an arm, memory the largest; None where no run tells.

    Attributes:
        seconds: of a run itself. share_seconds: of the extraction. total_seconds: both; None where one is unknown.
        teacher_forwards: images through the teacher in a run. cache_forwards: in making its cache, once for all runs.
        cache_bytes, bytes_per_view: of the cache. bytes_read: from it, by a run.
    """

    arm: str
    runs: int
    seconds: float | None
    share_seconds: float | None
    total_seconds: float | None
    teacher_forwards: float
    cache_forwards: float | None
    cache_bytes: float | None
    bytes_per_view: float | None
    bytes_read: float | None
    peak_memory_bytes: float | None
    device_memory_bytes: float | None


def cache_uses(runs: Iterable[Run]) -> tuple[CacheUse, ...]:
    """Return every cache that cached runs trained from, in order of first use."""
    used: dict[CacheKey, list[CacheRecord]] = {}
    for run in runs:
        if run.record.cache is not None and run.record.mode == CACHED:
            used.setdefault(_key(run.record.cache), []).append(run.record.cache)
    return tuple(
        CacheUse(next((cache for cache in caches if cache.extract_seconds is not None), caches[0]), len(caches))
        for caches in used.values()
    )


def arm_cost(arm: Arm, uses: Sequence[CacheUse]) -> ArmCost:
    """Return what an arm took; `uses` counts the runs of the whole report, who share the extraction."""
    records = [run.run.record for run in arm.runs]
    costs = [record.cost for record in records]
    by_cache = {_key(use.cache): use for use in uses}
    read = [by_cache.get(_key(record.cache)) if record.cache and record.mode == CACHED else None for record in records]
    seconds = _mean([cost.seconds for cost in costs])
    share = _mean([use.share_seconds for use in read if use]) if any(read) else 0.0
    return ArmCost(
        arm=arm.name,
        runs=len(records),
        seconds=seconds,
        share_seconds=share,
        total_seconds=None if seconds is None or share is None else seconds + share,
        teacher_forwards=statistics.fmean(cost.teacher_forwards for cost in costs),
        cache_forwards=_mean([use.cache.teacher_forwards for use in read if use]),
        cache_bytes=_mean([use.cache.bytes for use in read if use]),
        bytes_per_view=_mean([use.cache.bytes_per_view for use in read if use]),
        bytes_read=_mean([cost.bytes_read for cost in costs]),
        peak_memory_bytes=max((cost.peak_memory_bytes for cost in costs if cost.peak_memory_bytes), default=None),
        device_memory_bytes=max((cost.device_memory_bytes for cost in costs if cost.device_memory_bytes), default=None),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where there is no value or one is unknown."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
