"""In: a well-formed recipe. Out: what is wrong with its settings of Ultralytics and with the files that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_kd.errors import CacheKDError
from cache_kd.pipeline.recipes.schema import Faults
from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.models import check_pretrained, check_student
from cache_kd.ultralytics_bridge.settings import check_one_device, check_settings, check_training_settings
from cache_kd.views.recipe import BATCH_PIXEL_KEYS, RECIPE_KEYS

OWN = {
    "model": "student",
    "data": "data",
    "seed": "seeds",
    "split": "split",
    "distill_model": "an arm with mode: online",
    **dict.fromkeys(("project", "name", "exist_ok", "save_dir", "resume", "task", "mode", "cfg", "save"), ""),
}
"""Settings that a recipe sets itself, and its key for them."""
TOP = ("epochs", "batch")


def check_settings_of(content: Mapping[str, Any], faults: Faults) -> None:
    """Note settings that are none, that a recipe sets itself, or that would give arms other pixels."""
    for key, value in content.get("augment", {}).items():
        at = ("augment", key)
        if key not in RECIPE_KEYS:
            faults.add(at, f"augment.{key}: is no augmentation key; known: {', '.join(RECIPE_KEYS)}")
        else:
            _check_value(at, key, value, faults)
    for key, value in content.get("settings", {}).items():
        if key in TOP:
            faults.add(("settings", key), f"settings.{key}: has a key of its own, set {key}")
        else:
            _check_setting(("settings", key), key, value, faults)
    for name, arm in content.get("arms", {}).items():
        for key, value in arm.get("settings", {}).items():
            _check_setting(("arms", name, "settings", key), key, value, faults)


def _check_setting(at: tuple[str, ...], key: str, value: Any, faults: Faults) -> None:
    way = ".".join(at)
    if key in OWN:
        faults.add(at, f"{way}: is set by the recipe" + (f"; use {OWN[key]}" if OWN[key] else "; leave it out"))
    elif key in RECIPE_KEYS or key == "imgsz":
        own = "imgsz" if key == "imgsz" else f"augment.{key}"
        faults.add(
            at,
            f"{way}: changes the pixels, which stored targets belong to, and arms that see others cannot be compared; "
            f"change it for all of them: {own}",
        )
    elif key in BATCH_PIXEL_KEYS and value not in BATCH_PIXEL_KEYS[key]:
        faults.add(at, f"{way}: {value!r} changes the pixels by the batch, which no stored target fits; leave it out")
    else:
        _check_value(at, key, value, faults)


def _check_value(at: tuple[str, ...], key: str, value: Any, faults: Faults) -> None:
    try:
        check_settings({key: value})
        if key not in RECIPE_KEYS:
            check_training_settings({key: value})
        if key == "pretrained":
            check_pretrained(value, trusted=False)
        if key == "device":
            check_one_device(value, "a run of a recipe, whose memory and time are recorded,")
    except CacheKDError as error:
        faults.add(at, f"{'.'.join(at)}: {error}")


def check_files(content: Mapping[str, Any], faults: Faults) -> None:
    """Note files that are not there, or are not what they are named as; nothing is downloaded."""
    if "teacher" in content:
        teacher = Path(content["teacher"])
        if not teacher.is_file() or teacher.suffix != ".pt":
            faults.add(("teacher",), f"teacher: no checkpoint {teacher}; allowed: an existing file ending in .pt")
    trusted = content.get("trust_student", False)
    named: dict[tuple[str, ...], Any] = {("student",): content.get("student")}
    named |= {("arms", name, "student"): arm.get("student") for name, arm in content.get("arms", {}).items()}
    for at, student in named.items():
        if student is not None:
            _check_student(at, student, trusted, faults)
    if "data" in content:
        _check_data(Path(content["data"]), content.get("split"), faults)


def _check_student(at: tuple[str, ...], student: str, trusted: bool, faults: Faults) -> None:
    try:
        check_student(student, trusted=trusted)
    except CacheKDError as error:
        faults.add(at, f"{'.'.join(at)}: {str(error).removeprefix('--student ')}")


def _check_data(file: Path, split: str | None, faults: Faults) -> None:
    try:
        data = load_data(file)
    except CacheKDError as error:
        faults.add(("data",), f"data: {error}")
        return
    if split is not None:
        folders = data.get(split)
        missing = [str(f) for f in (folders if isinstance(folders, list) else [folders]) if not Path(f or "").exists()]
        if not folders or missing:
            lacks = f"names {', '.join(missing)}, which is not there" if folders else "has no such entry"
            faults.add(("split",), f"split: {split}, and {file} {lacks}; give it one, or judge on another split")
