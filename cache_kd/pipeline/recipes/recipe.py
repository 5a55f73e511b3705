"""In: a checked YAML mapping. Out: the recipe as frozen values: caches, arms, seeds, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAIN, ONLINE, COTRAINED, CACHED = MODES = ("plain", "online", "cotrained", "cached")


@dataclass(frozen=True)
class CacheEntry:
    """A cache of a recipe: `settings` of an extraction or, where `recode` names another cache, of a recoding."""

    name: str
    recode: str | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class ArmEntry:
    """What is compared; runs of one arm differ by their seed only.

    Attributes:
        mode: `plain`: without a teacher, on the views of `cache` where one is named, else as Ultralytics trains.
            `cached`: from `cache`. `online`: Ultralytics' own `distill_model=`. `cotrained`: the teacher is trained in
            the same steps and taught from what it says then.
        losses: canonical specs. balance: as `cache-kd train --balance`. views: mixed views of the cache to show, the
            first ones. settings: those of Ultralytics, over the recipe's.
    """

    name: str
    mode: str
    cache: str | None
    losses: tuple[str, ...]
    balance: float | None
    student: str
    views: int | None
    settings: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The name of the arm as part of a folder's."""
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Recipe:
    """A study; see pipelines/ for examples that say what each key means."""

    path: Path
    name: str
    question: str
    teacher: Path
    data: Path
    imgsz: int
    seeds: tuple[int, ...]
    split: str
    judge: str
    augment: Mapping[str, Any]
    caches: Mapping[str, CacheEntry]
    arms: tuple[ArmEntry, ...]
    jobs: int | None = None
    imports: tuple[Path, ...] = ()
    trust_teacher: bool = False
    trust_student: bool = False

    def root(self, cache: str) -> CacheEntry:
        """Return the extraction at the start of a cache's chain of recodings."""
        entry = self.caches[cache]
        return self.root(entry.recode) if entry.recode else entry

    def counts(self, cache: str) -> tuple[int, int]:
        """Return how many mixed and plain views a cache of this recipe has."""
        settings = self.root(cache).settings
        return int(settings["views"]), int(settings["plain_views"])
