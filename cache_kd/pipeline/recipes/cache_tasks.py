"""In: a recipe's caches. Out: what of them is there already, and what making the rest takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cache_kd.cache.manifest import load_manifest
from cache_kd.cache.store import Place
from cache_kd.errors import CacheKDError
from cache_kd.fingerprint import digest_json
from cache_kd.pipeline.extract_settings import DEFAULT_FIDELITY, ExtractSettings
from cache_kd.pipeline.locations import caches_folder
from cache_kd.pipeline.preparation import Plan, make_plan
from cache_kd.pipeline.recipes.forecasts import cache_costs
from cache_kd.pipeline.recipes.identity import cache_key
from cache_kd.pipeline.recipes.recipe import CacheEntry, Recipe
from cache_kd.structures import View


@dataclass(frozen=True)
class CacheTask:
    """A cache of the recipe.

    Attributes:
        views: those that it must hold. done: whether it holds them. needed: whether an open run reads it, or a cache
            that one reads comes from it. extraction: what makes it, None for a recoding, whose options are `settings`.
            seconds, bytes: what making it takes, None where that is not known.
    """

    name: str
    path: Place
    views: tuple[View, ...]
    done: bool
    needed: bool
    recode: str | None
    extraction: ExtractSettings | None
    settings: Mapping[str, Any]
    data: Path
    seconds: float | None = None
    bytes: float | None = None


class Extractions:
    """What the extractions of a recipe would do; each is planned once, and one teacher serves those that differ little.

    Attributes:
        base: the plan of an extraction with the recipe's teacher, data and augmentation.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.recipe, self._say = recipe, say
        self._plans: dict[str, Plan] = {}
        roots = [entry for entry in recipe.caches.values() if entry.recode is None]
        self.base = make_plan(self._settings(roots[0] if roots else None), say)
        self._plans = {entry.name: self._plan(entry) for entry in roots}

    def _settings(self, entry: CacheEntry | None) -> ExtractSettings:
        given: dict[str, Any] = dict(entry.settings) if entry else {}
        for key in ("store", "taps"):
            if key in given:
                given[key] = tuple(given[key])
        if "device" in given:
            given["device"] = str(given["device"])
        recipe = self.recipe
        return ExtractSettings(
            recipe.teacher,
            data=recipe.data,
            imgsz=recipe.imgsz,
            trust_teacher=recipe.trust_teacher,
            imports=recipe.imports,
            augment=recipe.augment,
            **given,
        )

    def _plan(self, entry: CacheEntry) -> Plan:
        settings, base = self._settings(entry), self.base
        same = all(
            getattr(settings, key) == getattr(base.settings, key) for key in ("taps", "pack", "precision", "store")
        )
        return replace(base, settings=settings) if same else make_plan(settings, lambda _: None)

    @cached_property
    def _identities(self) -> dict[str, str]:
        """The digests of the identities of the caches that are extracted."""
        return {
            name: digest_json(plan.identity(plan.codec(plan.settings.fidelity or DEFAULT_FIDELITY)))
            for name, plan in self._plans.items()
        }

    def key(self, cache: str) -> dict[str, Any]:
        """Return what the targets of any of the recipe's caches depend on."""
        return cache_key(cache, self._identities, self.recipe.caches)

    @cached_property
    def paths(self) -> dict[str, Place]:
        """The places of the caches: an extraction's default one, for other recipes and `cache-kd train` too."""
        return {name: self._path(name) for name in self.recipe.caches}

    def _path(self, cache: str) -> Place:
        entry = self.recipe.caches[cache]
        if entry.recode is None:
            plan = self._plans[cache]
            return plan.path(plan.codec(plan.settings.fidelity or DEFAULT_FIDELITY))
        name = f"{self.recipe.data.stem}-{self.recipe.teacher.stem}-recoded-{digest_json(self.key(cache))[:8]}"
        return caches_folder() / name

    def views(self, cache: str) -> tuple[View, ...]:
        """Return the views that a cache must hold."""
        return tuple(self._plans[self.recipe.root(cache).name].settings.view_list)

    def tasks(self, used: set[str]) -> tuple[CacheTask, ...]:
        """Return the recipe's caches, sources before what is recoded from them; `used`: those that open runs read."""
        done = {name: {*self.views(name)} <= _held(self.paths[name]) for name in self.recipe.caches}
        needed = set(used)
        for name in used:  # an open cache needs its source, and that one its own
            while not done[name] and (source := self.recipe.caches[name].recode) is not None:
                needed.add(source)
                name = source
        return tuple(self._cache_task(name, done[name], name in needed) for name in _in_order(self.recipe.caches))

    def _cache_task(self, name: str, done: bool, needed: bool) -> CacheTask:
        path, entry = self.paths[name], self.recipe.caches[name]
        extraction = None if entry.recode else replace(self._plans[name].settings, cache=path)
        views, data = self.views(name), self.recipe.data
        return CacheTask(name, path, views, done, needed and not done, entry.recode, extraction, entry.settings, data)

    def forecasts(self, tasks: Sequence[CacheTask]) -> tuple[CacheTask, ...]:
        """Return the tasks with what the open ones take, by a sample of their views."""
        found = []
        for task in tasks:
            costs: dict[str, Any] = {}
            if task.needed:
                held = _held(task.path)
                missing = [view for view in task.views if view not in held]
                plan = self._plans[self.recipe.root(task.name).name]
                costs = cache_costs(plan, self.recipe, task.name, missing)
            found.append(replace(task, **costs))
        return tuple(found)


def _in_order(entries: Mapping[str, CacheEntry]) -> list[str]:
    """Return the names of caches, each after its source."""

    def depth(name: str) -> int:
        source = entries[name].recode
        return 0 if source is None else 1 + depth(source)

    return sorted(entries, key=depth)


def _held(path: Place) -> set[View]:
    """Return the views that a complete cache holds; none where there is no such cache."""
    try:
        return {*load_manifest(path).views}
    except CacheKDError:
        return set()
