"""In: a recipe's file and words of `--set`. Out: the recipe, or everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache_kd.config import read_marked
from cache_kd.errors import RecipeError, choices
from cache_kd.losses import parse_losses
from cache_kd.pipeline.recipes.combinations import check_arms, check_caches
from cache_kd.pipeline.recipes.recipe import COTRAINED, ONLINE, ArmEntry, CacheEntry, Recipe
from cache_kd.pipeline.recipes.schema import Faults, well_formed
from cache_kd.pipeline.recipes.settings import check_files, check_settings_of
from cache_kd.ultralytics_bridge.gate import import_user_modules

LIVE_LOSS = "sl2"


def read_recipe(path: Path, changes: Sequence[str] = (), arms: Collection[str] = ()) -> Recipe:
    """Return the recipe in a file, changed by words like `settings.lr0=0.01`, with all its arms or with some.

    Raises:
        MissingFileError: There is no such file.
        RecipeError: Something is wrong with it; all faults are said, in the order of their lines.
    """
    marked = read_marked(path)
    if marked.content:
        for word in changes:
            if unknown := _unknown_entry(word, marked.content):
                marked.faults.append((f"--set {word}", unknown))
            else:
                marked.set(word)
    faults = Faults(marked)
    content: dict[str, Any] = {}
    if marked.content:
        content = well_formed(marked, faults)
        import_user_modules(content.get("imports", ()))  # first: a file may add losses
        check_caches(content, faults)
        check_arms(content, faults)
        check_settings_of(content, faults)
        check_files(content, faults)
    known = content.get("arms", {})
    not_there = [(f"--arm {name}", f"no arm {name!r}; {choices(name, known)}") for name in arms if name not in known]
    found = [*marked.faults, *faults.found, *(not_there if known else ())]
    if found:
        raise RecipeError(f"{place}: {text}" for place, text in sorted(found, key=_line))
    recipe = _recipe(path, content)
    return replace(recipe, arms=tuple(arm for arm in recipe.arms if not arms or arm.name in arms))


def _unknown_entry(word: str, content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a change inside a cache or arm that the recipe has not; None if nothing is."""
    section, *names = word.partition("=")[0].split(".")
    entries = content.get(section)
    if section not in ("caches", "arms") or len(names) < 2 or not isinstance(entries, dict) or names[0] in entries:
        return None
    return f"no {section.removesuffix('s')} {names[0]!r}; {choices(names[0], entries)}"


def _line(fault: tuple[str, str]) -> tuple[bool, int]:
    """Return what faults are sorted by: those of options last, the others by their line."""
    place = fault[0]
    number = place.rpartition(":")[2]
    return place.startswith("--"), int(number) if number.isdigit() else 0


def _recipe(path: Path, content: Mapping[str, Any]) -> Recipe:
    caches = {
        name: CacheEntry(name, entry.get("recode"), {key: value for key, value in entry.items() if key != "recode"})
        for name, entry in content.get("caches", {}).items()
    }
    return Recipe(
        path=path,
        name=content["name"],
        question=" ".join(content["question"].split()),
        teacher=Path(content["teacher"]),
        data=Path(content["data"]),
        imgsz=content["imgsz"],
        seeds=tuple(content["seeds"]),
        split=content["split"],
        judge=content["judge"],
        augment=content.get("augment", {}),
        caches=caches,
        arms=tuple(_arm(name, entry, content) for name, entry in content["arms"].items()),
        jobs=content.get("jobs"),
        imports=tuple(map(Path, content.get("imports", ()))),
        trust_teacher=content.get("trust_teacher", False),
        trust_student=content.get("trust_student", False),
    )


def _arm(name: str, entry: Mapping[str, Any], content: Mapping[str, Any]) -> ArmEntry:
    shared = {"epochs": content["epochs"], "batch": content["batch"], **content.get("settings", {})}
    settings = {**shared, **entry.get("settings", {})}
    losses = entry.get("losses", [LIVE_LOSS] if entry["mode"] == COTRAINED else [])
    if entry["mode"] == ONLINE:  # Ultralytics' own, whose weight is its setting
        losses = [f"{LIVE_LOSS}:weight={float(settings.get('dis', 6.0))}"]
    return ArmEntry(
        name=name,
        mode=entry["mode"],
        cache=entry.get("cache"),
        losses=tuple(map(str, parse_losses(losses))),
        balance=entry.get("balance"),
        student=entry.get("student", content["student"]),
        views=entry.get("views"),
        settings=settings,
    )
