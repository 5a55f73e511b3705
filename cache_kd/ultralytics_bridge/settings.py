"""In: settings by Ultralytics' names. Out: the same, checked by Ultralytics itself, faults as one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from ultralytics.cfg import check_dict_alignment, get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.torch_utils import parse_device, select_device

from cache_kd.errors import CacheKDError, SettingError
from cache_kd.views.recipe import BATCH_PIXEL_KEYS, RECIPE_KEYS, Recipe


def default_settings() -> dict[str, Any]:
    """Return Ultralytics' stock settings."""
    return dict(DEFAULT_CFG_DICT)


OWN_OPTIONS = {"model": "--student", "data": "--data", "task": None, "mode": None, "cfg": None}
"""Settings that a run of ours does not take as KEY=VALUE, and the option that stands for each."""
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "batch": ("1 or more, -1, or a share of the memory below 1", lambda value: value == -1 or value > 0),
    "close_mosaic": ("0 or more", lambda value: value >= 0),
    "warmup_epochs": ("0 or more", lambda value: value >= 0),
    "time": ("hours above 0", lambda value: value is None or value > 0),
    "cache": ("ram, disk, True, False", lambda value: value in ("ram", "disk", True, False, None)),
    "freeze": ("a number of layers, or a list of layers", lambda value: all(_is_layer(n) for n in _listed(value))),
}
"""What Ultralytics takes without a word and then reads as something else."""


def check_training_settings(settings: Mapping[str, Any]) -> None:
    """Raise `SettingError` for a setting that Ultralytics would take silently and not follow."""
    for key, option in OWN_OPTIONS.items():
        if key in settings:
            raise SettingError(
                f"{key}={settings[key]} is not taken; "
                + (f"use {option} {settings[key]}" if option else "leave it out")
            )
    for key, (text, test) in ALLOWED.items():
        if key in settings and not test(settings[key]):
            raise SettingError(f"{key}={settings[key]} is not allowed; allowed: {text}")


def check_selection(recipe: Mapping[str, Any], classes: int) -> None:
    """Raise `SettingError` for keys of a recipe that Ultralytics does not check, for a data set of so many classes."""
    chosen = recipe["classes"]
    if chosen is not None and (not _listed(chosen) or not all(n in range(classes) for n in _listed(chosen))):
        raise SettingError(f"classes={chosen}; allowed: a list of class numbers from 0 to {classes - 1}")
    if (mode := recipe["copy_paste_mode"]) not in (None, "flip", "mixup"):
        raise SettingError(f"copy_paste_mode={mode}; allowed: flip, mixup")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_layer(value: Any) -> bool:
    return type(value) is int and value >= 0


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `SettingError` with Ultralytics' own words if a key or value is not one of its settings."""
    try:
        check_dict_alignment(DEFAULT_CFG_DICT, dict(settings), allowed_custom_keys={"augmentations", "save_dir"})
        get_cfg(overrides=dict(settings))
    except (SyntaxError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise SettingError(text.split("Arguments received")[0].strip() or "not an Ultralytics setting") from None


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what Ultralytics raises while it prepares a run into an error of ours, of one line."""
    try:
        yield
    except CacheKDError:
        raise
    except (AssertionError, FileNotFoundError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(
            f"Ultralytics cannot start this run: {reason}; see its traceback: cache-kd --debug"
        ) from error


def check_device(device: object) -> None:
    """Raise `SettingError` unless `device` can be used here; None lets Ultralytics choose."""
    try:
        select_device("" if device is None else device, verbose=False)
    except (ValueError, RuntimeError):
        count = torch.cuda.device_count()
        seen = f"cpu, or of the {count} GPUs that torch sees one or several, as device=0 or device=0,1"
        seen = seen if count else "cpu; torch sees no GPU"
        raise SettingError(f"device={device} cannot be used here; allowed: {seen}") from None


def check_one_device(device: object, purpose: str) -> None:
    """Raise `SettingError` where `purpose` cannot be done on several devices and `device` names some."""
    if device is not None and len(parse_device(device).split(",")) > 1:
        raise SettingError(f"device={device}: {purpose} takes one device; allowed: one, as device=0")


def check_pixel_settings(settings: Mapping[str, Any], recipe: Recipe, imgsz: int) -> None:
    """Raise `SettingError` when a training setting would change the pixels that the targets belong to."""
    faults = [
        f"{key}={value!r} (the cache has {mine!r})" for key, (mine, value) in recipe.differences(settings).items()
    ]
    if "imgsz" in settings and settings["imgsz"] != imgsz:
        faults.append(f"imgsz={settings['imgsz']!r} (the cache has {imgsz})")
    for key, allowed in BATCH_PIXEL_KEYS.items():
        if key in settings and settings[key] not in allowed:
            faults.append(f"{key}={settings[key]!r} (allowed: {allowed[0]!r})")
    if settings.get("cache") == "disk":
        faults.append("cache='disk' (writes .npy files beside the images; allowed: ram, False)")
    if faults:
        raise SettingError(
            f"settings that change pixels are fixed by the cache: {', '.join(faults)}; leave them out, or run "
            "cache-kd extract again with them"
        )


def fixed_overrides(recipe: Recipe, imgsz: int) -> dict[str, Any]:
    """Return the settings of a run that the cache fixes, so that args.yaml says what was shown."""
    values = {key: value for key, value in recipe.to_json().items() if value is not None and key in RECIPE_KEYS}
    return {**values, "imgsz": imgsz, "multi_scale": 0.0, "rect": False}
