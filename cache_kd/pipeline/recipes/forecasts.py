"""In: a cache that is still to be made. Out: the seconds and bytes that it will take, by a sample of its views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cache_kd.codecs import ViewCodec
from cache_kd.pipeline.default_losses import arrays_read
from cache_kd.pipeline.forecast import forecast
from cache_kd.pipeline.preparation import Plan
from cache_kd.pipeline.probe import PROBE_ITEMS
from cache_kd.pipeline.recipes.combinations import resolved
from cache_kd.pipeline.recipes.recipe import Recipe
from cache_kd.structures import KINDS, View

WRITE_RATE = 2e8
"""Bytes a second; the disk is not asked: it seldom decides."""


def cache_costs(plan: Plan, recipe: Recipe, name: str, views: Sequence[View]) -> dict[str, float | None]:
    """Return {seconds, bytes} of making a cache of `recipe` with `views`; seconds are None for a recoding.

    Args:
        plan: of the extraction at the start of the cache's chain.
    """
    entries = {key: {"recode": entry.recode, **entry.settings} for key, entry in recipe.caches.items()}
    fidelity, store, _ = resolved(name, {key: _without_none(entry) for key, entry in entries.items()})
    head = plan.teacher.head if "features" in store else replace(plan.teacher.head, layers=())
    codec = ViewCodec.create(fidelity, head, plan.imgsz, tuple(store))
    probed = plan.probe({fidelity: codec}, views, items=PROBE_ITEMS, most=PROBE_ITEMS)
    counts = {kind: sum(view.kind == kind for view in views) for kind in KINDS}
    work = plan.workload(codec, counts, write_rate=WRITE_RATE, fixed_bytes=plan.fixed_bytes())
    found = forecast(probed, fidelity, work, arrays_read(codec, plan.dataset.packing))
    recoded = recipe.caches[name].recode is not None
    return {"seconds": None if recoded else found.seconds, "bytes": found.bytes}


def _without_none(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}
