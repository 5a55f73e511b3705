"""In: plain Python values. Out: the functions of `import cache_kd`: extract, train, open_cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_kd.cache.places import parse_place
from cache_kd.cache.store import Place
from cache_kd.config import parse_size
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import extract as run_extraction
from cache_kd.pipeline.opened import Cache, open_cache
from cache_kd.pipeline.parts import Part
from cache_kd.pipeline.recipes.execution import run_recipe_file
from cache_kd.pipeline.recipes.results import RecipeResult
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import Trained
from cache_kd.pipeline.training import train as run_training

__all__ = ["Cache", "extract", "open_cache", "run_recipe", "train"]
LOG = logging.getLogger(__name__)
_EXTRACT_OPTIONS = frozenset(ExtractSettings.__dataclass_fields__)


def extract(teacher: str | Path, **options: Any) -> Cache | None:
    """Run the teacher over the views of its data set and return the cache; None while other parts are missing.

    Args:
        teacher: Checkpoint.
        options: Fields of `ExtractSettings` (data, cache, views, plain_views, imgsz, batch, device, workers, seed,
            store, fidelity, budget, precision, part="3/16", processes, …); any other name is an augmentation key of
            Ultralytics. With `processes` a script needs `if __name__ == "__main__":`, as they import it again.

    Raises:
        CacheKDError: One line about what is wrong.
    """
    own = {key: value for key, value in options.items() if key in _EXTRACT_OPTIONS}
    augment = {key: value for key, value in options.items() if key not in _EXTRACT_OPTIONS}
    for key, parse in (("data", Path), ("cache", parse_place)):
        if own.get(key) is not None:
            own[key] = parse(own[key])
    for name in ("store", "taps", "imports"):
        if name in own:
            own[name] = tuple(own[name])
    if isinstance(own.get("part"), str):
        own["part"] = Part.parse(own["part"])
    if isinstance(own.get("budget"), str):
        own["budget"] = parse_size(own["budget"], "budget")
    done = run_extraction(ExtractSettings(Path(teacher), augment=augment, **own))
    return Cache(done.path) if done.manifest is not None else None


def train(
    student: str | Path,
    *,
    cache: Cache | str | Place | None = None,
    losses: Sequence[str] = (),
    balance: float | None = None,
    data: str | Path | None = None,
    name: str | None = None,
    verify_pixels: str = "first",
    views: int | None = None,
    plain_views: int | None = None,
    threads: int | None = None,
    trust_student: bool = False,
    imports: Sequence[str | Path] = (),
    **settings: Any,
) -> Trained:
    """Train a student from a cache and return its run's folder, losses and metrics.

    Args:
        student: Model YAML or checkpoint.
        cache: A `Cache`, its folder or URL, or None for the newest complete one.
        losses: Specs as on the command line; empty takes the defaults, ["none"] trains plainly on the same views.
        balance: Share of the neck's gradient at which each term is held that names no share of its own.
        views, plain_views: Mixed and plain views to show, the cache's first ones; None shows all.
        threads, trust_student, imports: As the options of `cache-kd train`.
        settings: Ultralytics' own settings, such as epochs=50.

    Raises:
        CacheKDError: One line about what does not fit.
    """
    folder = cache.path if isinstance(cache, Cache) else cache
    return run_training(
        TrainSettings(
            student=str(student),
            cache=parse_place(folder) if folder is not None else None,
            data=Path(data) if data is not None else None,
            losses=tuple(losses),
            balance=balance,
            name=name,
            verify_pixels=verify_pixels,
            views=views,
            plain_views=plain_views,
            threads=threads,
            trust_student=trust_student,
            imports=tuple(map(Path, imports)),
            settings=settings,
        )
    )


def run_recipe(
    path: str | Path,
    *,
    changes: Sequence[str] = (),
    arms: Sequence[str] = (),
    jobs: int | None = None,
    dry_run: bool = False,
) -> RecipeResult:
    """Run a recipe and return its plan and the records of its runs; what is done already is not done again.

    Args:
        changes: Words as of `--set`, such as "epochs=3". arms: Those to do; all where none is named.
        jobs: Runs at once. dry_run: Only check and plan.

    Raises:
        RecipeError: Something is wrong with the recipe; its `faults` say everything. CacheKDError: A file is missing.
    """
    return run_recipe_file(Path(path), changes=changes, arms=arms, jobs=jobs, dry_run=dry_run, say=LOG.info)
