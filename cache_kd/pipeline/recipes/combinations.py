"""In: a well-formed recipe. Out: what in it cannot go together: caches of nothing, arms that no mode allows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cache_kd.codecs import FIDELITIES
from cache_kd.errors import CacheKDError, choices
from cache_kd.losses import LossSpec, parse_loss
from cache_kd.pipeline.extract_settings import DEFAULT_FIDELITY
from cache_kd.pipeline.recipes.recipe import CACHED, COTRAINED, ONLINE, PLAIN
from cache_kd.pipeline.recipes.schema import Faults
from cache_kd.views.packing import parse_packing

Table = Mapping[str, Any]
STORES = ("features", "logits")
"""What an extraction stores unless told otherwise."""
STORE_OF = {"features": "features", "score_map": "features", "logits": "logits", "hold_stats": "logits", "vlr": "vlr"}
LEVELS = ("P3", "P4", "P5")


def check_caches(content: Table, faults: Faults) -> None:
    """Note recodings of what is not there, in a circle, or into what their source does not hold."""
    caches = content.get("caches", {})
    for name, entry in caches.items():
        at = ("caches", name)
        if "pack" in entry:
            _noted(lambda entry=entry: parse_packing(entry["pack"]), (*at, "pack"), faults)
        if "recode" not in entry:
            if entry.get("views") == entry.get("plain_views") == 0:
                faults.add(at, f"caches.{name}: views 0 and plain_views 0 leave nothing to extract")
            continue
        source = entry["recode"]
        if source not in caches:
            faults.add((*at, "recode"), f"caches.{name}.recode: no cache {source!r}; {choices(source, caches)}")
        elif circle := _circle(name, caches):
            faults.add((*at, "recode"), f"caches.{name}: is recoded from itself: {' from '.join(circle)}")
        else:
            _check_recoding(name, entry, caches, faults)


def _circle(name: str, caches: Table) -> list[str]:
    """Return the names on the way from a cache back to itself; none where its chain ends."""
    way = [name]
    while (source := caches.get(way[-1], {}).get("recode")) is not None:
        if source in way:
            return [*way, source] if source == name else []
        way.append(source)
    return []


def resolved(name: str, caches: Table) -> tuple[str, list[str], list[str]]:
    """Return fidelity, stores and taps of a cache whose chain of recodings ends."""
    entry = caches.get(name, {})
    if "recode" not in entry:
        return entry.get("fidelity", DEFAULT_FIDELITY), entry.get("store", list(STORES)), entry.get("taps", [])
    fidelity, store, taps = resolved(entry["recode"], caches)
    return entry.get("fidelity", fidelity), entry.get("store", store), taps


def _check_recoding(name: str, entry: Table, caches: Table, faults: Faults) -> None:
    if any(_circle(link, caches) for link in _chain(name, caches)):
        return
    at, names = ("caches", name), list(FIDELITIES)
    before, had, _ = resolved(entry["recode"], caches)
    after, store, _ = resolved(name, caches)
    if names.index(after) < names.index(before):
        coarser = ", ".join(names[names.index(before) + 1 :]) or "none"
        faults.add(
            (*at, "fidelity"),
            f"caches.{name}.fidelity: {after} is finer than {before} of its source {entry['recode']}; what was left "
            f"out cannot come back; allowed: {coarser}",
        )
    elif after == before and set(store) == set(had):
        faults.add(at, f"caches.{name}: is what {entry['recode']} is; give a coarser fidelity or fewer of store")
    if added := [item for item in store if item not in had]:
        faults.add((*at, "store"), f"caches.{name}.store: its source {entry['recode']} has no {', '.join(added)}")


def _chain(name: str, caches: Table) -> list[str]:
    """Return a cache and those that it comes from, each once."""
    way: list[str] = []
    link: str | None = name
    while link is not None and link not in way:
        way.append(link)
        link = caches.get(link, {}).get("recode")
    return way


def check_arms(content: Table, faults: Faults) -> None:
    """Note what the mode of an arm does not allow, losses that are none, and arms that are there twice."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name, arm in content.get("arms", {}).items():
        at = ("arms", name)
        if (mode := arm.get("mode")) is not None:
            _check_mode(name, mode, arm, faults)
        _check_views(name, arm, content, faults)
        _check_losses(name, arm, content, faults)
        if (folder := name.replace(" ", "-")) in folders:
            faults.add(at, f"arms.{name}: would be written where {folders[folder]!r} is; rename one")
        folders[folder] = name
        twin = repr(sorted(arm.items(), key=lambda item: item[0]))
        if twin in seen:
            faults.add(at, f"arms.{name}: repeats {seen[twin]!r}; change or remove one")
        seen.setdefault(twin, name)


def _check_mode(name: str, mode: str, arm: Table, faults: Faults) -> None:
    at = ("arms", name)
    if mode == CACHED:
        for key in ("cache", "losses"):
            if key not in faults.marked.content["arms"][name]:
                faults.add(at, f"arms.{name}.{key} is missing; mode cached trains from a cache with losses")
    if mode in (ONLINE, COTRAINED) and "cache" in arm:
        faults.add(
            (*at, "cache"), f"arms.{name}.cache: mode {mode} has its teacher beside it and reads no cache; leave it out"
        )
    if mode == PLAIN and "losses" in arm:
        faults.add((*at, "losses"), f"arms.{name}.losses: mode plain has none; leave them out, or use mode cached")
    if mode != CACHED and "balance" in arm:
        faults.add((*at, "balance"), f"arms.{name}.balance: only mode cached holds shares of the gradient")
    if mode == ONLINE and arm.get("losses", ["sl2"]) != ["sl2"]:
        faults.add(
            (*at, "losses"),
            f"arms.{name}.losses: mode online is Ultralytics' distill_model, which has its own loss only; allowed: "
            "[sl2], whose weight is settings.dis; other losses: mode cached",
        )
    if mode == COTRAINED and [text.partition(":")[0] for text in arm.get("losses", ["sl2"])] != ["sl2"]:
        faults.add((*at, "losses"), f"arms.{name}.losses: mode cotrained distils with sl2; allowed: [sl2] or [sl2:…]")


def _check_views(name: str, arm: Table, content: Table, faults: Faults) -> None:
    """Note a cache that is not there and views that it will not hold."""
    caches, cache = content.get("caches", {}), arm.get("cache")
    if cache is None:
        if "views" in arm:
            faults.add(("arms", name, "views"), f"arms.{name}.views: are those of a cache, and the arm names none")
        return
    if cache not in caches:
        faults.add(("arms", name, "cache"), f"arms.{name}.cache: no cache {cache!r}; {choices(cache, caches)}")
        return
    root = caches.get(_chain(cache, caches)[-1], {})
    if "views" in root and arm.get("views", 0) > root["views"]:
        faults.add(("arms", name, "views"), f"arms.{name}.views: {arm['views']}; cache {cache} has {root['views']}")


def _check_losses(name: str, arm: Table, content: Table, faults: Faults) -> None:
    at, specs = ("arms", name, "losses"), list[LossSpec]()
    for text in arm.get("losses", ()):
        _noted(lambda text=text: specs.append(parse_loss(text)), at, faults, f"arms.{name}.losses: ")
    names = [spec.name for spec in specs]
    for twice in sorted({loss for loss in names if names.count(loss) > 1}):
        faults.add(at, f"arms.{name}.losses: {twice} is there {names.count(twice)} times; give each loss once")
    caches, cache = content.get("caches", {}), arm.get("cache")
    if (
        cache is not None
        and cache in caches
        and arm.get("mode") == CACHED
        and not any(_circle(x, caches) for x in _chain(cache, caches))
    ):
        _, store, taps = resolved(cache, caches)
        for spec in specs:
            if missing := _lacking(spec.needs, store, taps):
                faults.add(at, f"arms.{name}.losses: {spec.name} needs {missing}, which cache {cache} does not store")


def _lacking(needs: Collection[str], store: Collection[str], taps: Collection[str]) -> str:
    """Return what of `needs` a cache has not, in words; "" if it has all."""
    wanted = {STORE_OF.get(need, "features") for need in needs if not need.startswith("map:")}
    maps = [need.removeprefix("map:") for need in needs if need.startswith("map:")]
    wanted |= {"features"} if maps else set()
    layers = [layer for layer in sorted(maps) if layer not in LEVELS and layer not in taps]
    missing = [f"store {name}" for name in sorted(wanted - {*store})]
    return ", ".join([*missing, *(f"taps {layer}" for layer in layers)])


def _noted(check: Any, at: tuple[str, ...], faults: Faults, prefix: str = "") -> None:
    """Note the error of ours that `check` raises."""
    try:
        check()
    except CacheKDError as error:
        faults.add(at, prefix + str(error))
