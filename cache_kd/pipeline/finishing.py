"""In: a cache of which parts were extracted. Out: the complete cache, without the teacher; or what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable

from cache_kd.cache.attempts import Attempts
from cache_kd.cache.extraction_plan import Plan, read_plan
from cache_kd.cache.manifest import NAME
from cache_kd.cache.places import open_store
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.store import Place, Store
from cache_kd.cache.writer import CacheWriter
from cache_kd.errors import DamagedCacheError, MissingFileError
from cache_kd.pipeline.extraction import Extracted
from cache_kd.pipeline.parts import part_holding
from cache_kd.pipeline.quarantine import named
from cache_kd.teacher.extract import Unit, all_units

_NAMED = 6


def finish(place: Place, *, say: Callable[[str], None]) -> Extracted:
    """Check that every unit of an extraction is there and write the manifest that makes it a cache.

    Raises:
        MissingFileError: no cache, or none that was begun. DamagedCacheError: units are missing; it says which.
    """
    started, store = time.perf_counter(), open_store(place)
    try:
        plan = read_plan(store)
    except MissingFileError:
        if not store.exists(NAME):
            raise
        say(f"{place} is complete; nothing to finish")
        reader = CacheReader(place)
        return Extracted(place, reader.manifest, reader.num_bytes, 0, time.perf_counter() - started)
    with CacheWriter.open_begun(place, shared=True) as writer:
        units = all_units(writer, plan.views)
        recorded = writer.records.named()
        if missing := [(n, unit) for n, unit in enumerate(units) if (unit.view, unit.shard) not in recorded]:
            raise DamagedCacheError(_missing(store, plan, dict(missing), len(units)))
        manifest = writer.finish(plan.views, dict(plan.manifest))
    num_bytes = CacheReader(place).num_bytes
    return Extracted(place, manifest, num_bytes, 0, time.perf_counter() - started)


def _missing(store: Store, plan: Plan, missing: dict[int, Unit], count: int) -> str:
    """Return the line about what is missing, why, and how it is made."""
    names = [str(unit) for unit in missing.values()]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    line = f"{store.place}: unfinished, missing {len(names)} of {count} units: {', '.join(names[:_NAMED])}{more}"
    quarantined = Attempts(store).given_up()
    given_up = {
        unit: quarantined[unit.view, unit.shard] for unit in missing.values() if (unit.view, unit.shard) in quarantined
    }
    if given_up:
        line += f"; {len(given_up)} of them quarantined: {named(given_up)}"
    parts = sorted({part_holding(number, plan.parts).number for number in missing})
    where = f" --part {parts[0]}/{plan.parts}" if plan.parts > 1 else ""
    others = f" (and parts {', '.join(map(str, parts[1:]))})" if len(parts) > 1 else ""
    return f"{line}; run the same `cache-kd extract`{where}{' --retry' if given_up else ''} again{others}"
