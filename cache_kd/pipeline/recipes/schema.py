"""In: a recipe's mapping. Out: the same without what is wrong in form: unknown keys, wrong types, missing keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cache_kd.cache.files import brief
from cache_kd.codecs import FIDELITIES
from cache_kd.config import MarkedYaml
from cache_kd.errors import choices
from cache_kd.pipeline.extract_settings import MAX_IMGSZ, RANGES
from cache_kd.pipeline.recipes.recipe import MODES
from cache_kd.structures import STORES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+,=@ -]*")


@dataclass(frozen=True)
class Rule:
    """What a value may be, as a test and in words; `required` keys must be there."""

    text: str
    test: Callable[[Any], bool]
    required: bool = False


def whole(low: int, high: int | None = None, *, required: bool = False) -> Rule:
    """Return the rule of a whole number."""
    words = f"a whole number, {low} or more" if high is None else f"a whole number, {low} to {high}"
    return Rule(words, lambda value: type(value) is int and low <= value <= (high or value), required)


def one_of(*names: str, required: bool = False) -> Rule:
    """Return the rule of a word."""
    return Rule(", ".join(names), lambda value: value in names, required)


def listed(what: str, test: Callable[[Any], bool], *, required: bool = False) -> Rule:
    """Return the rule of a list of different entries, at least one."""
    return Rule(
        f"a list of {what}, each once",
        lambda value: (
            isinstance(value, list)
            and bool(value)
            and all(test(item) for item in value)
            and len({str(item) for item in value}) == len(value)
        ),
        required,
    )


def text(what: str = "a text", *, required: bool = False) -> Rule:
    """Return the rule of a text."""
    return Rule(what, lambda value: isinstance(value, str) and bool(value.strip()), required)


def table(what: str, *, required: bool = False) -> Rule:
    """Return the rule of a mapping; one that is required holds something."""
    return Rule(what, lambda value: isinstance(value, dict) and bool(value or not required), required)


FLAG = Rule("true, false", lambda value: isinstance(value, bool))
IMGSZ = Rule(
    f"a multiple of 32, 32 to {MAX_IMGSZ}",
    lambda value: type(value) is int and 32 <= value <= MAX_IMGSZ and value % 32 == 0,
    required=True,
)
SHARE = Rule("a share above 0, up to 0.9", lambda value: type(value) in (int, float) and 0 < value <= 0.9)
LOSSES = Rule(
    'a list of losses, as [cwd, "ld:weight=2"]',
    lambda value: isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value),
)
RECIPE: dict[str, Rule] = {
    "name": text("letters, digits, _ and -", required=True),
    "question": text("what is asked, in words", required=True),
    "teacher": text("a checkpoint, as best.pt", required=True),
    "data": text("a data file, as bccd.yaml", required=True),
    "student": text("a model YAML or checkpoint, as yolov8n.yaml", required=True),
    "imgsz": IMGSZ,
    "epochs": whole(1, required=True),
    "batch": whole(1, required=True),
    "seeds": listed("whole numbers", lambda value: type(value) is int, required=True),
    "split": one_of("test", "val", required=True),
    "judge": one_of("last", "best", required=True),
    "augment": table("augmentation keys, over those that the teacher's checkpoint recorded"),
    "settings": table("Ultralytics' settings"),
    "caches": table("caches by name"),
    "arms": table("arms by name", required=True),
    "jobs": whole(1, 1024),
    "imports": listed("Python files", lambda value: isinstance(value, str)),
    "trust_teacher": FLAG,
    "trust_student": FLAG,
}
EXTRACTION: dict[str, Rule] = {
    "views": whole(*RANGES["views"], required=True),
    "plain_views": whole(*RANGES["plain_views"], required=True),
    "seed": Rule("a whole number", lambda value: type(value) is int),
    "store": listed(f"some of {', '.join(STORES)}", lambda value: value in STORES),
    "taps": listed("layers, as C3", lambda value: isinstance(value, str)),
    "fidelity": one_of(*FIDELITIES),
    "pack": text("none, jpeg[:quality] or png"),
    "precision": one_of("fp32", "fp16"),
    "batch": whole(*RANGES["batch"]),
    "device": Rule("a device, as cpu or 0", lambda value: isinstance(value, str) or type(value) is int),
    "workers": whole(*RANGES["workers"]),
}
RECODING: dict[str, Rule] = {
    "recode": text("the name of another cache", required=True),
    **{key: EXTRACTION[key] for key in ("fidelity", "store")},
}
ARM: dict[str, Rule] = {
    "mode": one_of(*MODES, required=True),
    "cache": text("the name of a cache"),
    "losses": LOSSES,
    "balance": SHARE,
    "student": text("a model YAML or checkpoint, as yolov8n.yaml"),
    "views": whole(1),
    "settings": table("Ultralytics' settings"),
}


@dataclass
class Faults:
    """Collects what is wrong, each with the place that it stands at."""

    marked: MarkedYaml
    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: tuple[str, ...], words: str) -> None:
        """Note a fault of the value at `key`."""
        self.found.append((self.marked.place(*key), words))


def well_formed(marked: MarkedYaml, faults: Faults) -> dict[str, Any]:
    """Return the mapping with only what has the right form; the rest is noted."""
    content = checked_table(marked.content, RECIPE, (), faults)
    if "name" in content and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", content["name"]):
        faults.add(("name",), f"name: {content.pop('name')!r}; allowed: letters, digits, _ and -")
    for section in ("caches", "arms"):
        tables = {}
        for name, entry in content.get(section, {}).items():
            key = (section, name)
            if not NAME.fullmatch(name):
                faults.add(key, f"{section}: {name!r} is no name; allowed: letters, digits, blanks and _+,=@-")
            if not isinstance(entry, dict):
                faults.add(key, f"{section}.{name}: {brief(repr(entry), 60)}; allowed: keys and values")
                continue
            rules = ARM if section == "arms" else RECODING if "recode" in entry else EXTRACTION
            known = RECODING | EXTRACTION if rules is EXTRACTION else None
            tables[name] = checked_table(entry, rules, key, faults, known)
        content[section] = tables
    return content


def checked_table(
    entries: Mapping[str, Any],
    rules: Mapping[str, Rule],
    at: tuple[str, ...],
    faults: Faults,
    known: Mapping[str, Rule] | None = None,
) -> dict[str, Any]:
    """Return the entries that their rules allow; `known`: what to name beside them where a key is unknown."""
    kept: dict[str, Any] = {}
    for key, value in entries.items():
        way = ".".join((*at, key))
        if key not in rules:
            if rules is RECODING and key in EXTRACTION:
                faults.add((*at, key), f"{way}: a recoded cache has its source's; set it there")
            else:
                faults.add((*at, key), f"{way}: no such key; {choices(key, known or rules)}")
        elif value is None and not rules[key].required:
            continue
        elif not rules[key].test(value):
            faults.add((*at, key), f"{way}: {brief(repr(value), 60)}; allowed: {rules[key].text}")
        else:
            kept[key] = value
    for key, rule in rules.items():
        if rule.required and key not in entries:
            faults.add(at, f"{'.'.join((*at, key))} is missing; allowed: {rule.text}")
    return kept
