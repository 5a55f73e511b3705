"""In: settings by Ultralytics' names. Out: the same, checked by Ultralytics itself, faults as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultralytics.cfg import check_dict_alignment, get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from cache_kd.errors import SettingError


def default_settings() -> dict[str, Any]:
    """Return Ultralytics' stock settings."""
    return dict(DEFAULT_CFG_DICT)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `SettingError` with Ultralytics' own words if a key or value is not one of its settings."""
    try:
        check_dict_alignment(DEFAULT_CFG_DICT, dict(settings), allowed_custom_keys={"augmentations", "save_dir"})
        get_cfg(overrides=dict(settings))
    except (SyntaxError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise SettingError(text.split("Arguments received")[0].strip() or "not an Ultralytics setting") from None
