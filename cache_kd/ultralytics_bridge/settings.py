"""In: settings by Ultralytics' names. Out: the same, checked by Ultralytics itself, faults as one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ultralytics.cfg import check_dict_alignment, get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from cache_kd.errors import SettingError


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
