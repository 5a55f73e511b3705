"""In: Ultralytics settings. Out: the part of them that decides pixels and labels, frozen and comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache_kd.structures import View

GEOMETRY_AND_COLOUR = (
    "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "bgr",
)  # fmt: skip
MIXING = ("mosaic", "mixup", "cutmix", "copy_paste")
SELECTION = ("single_cls", "classes", "fraction")
RECIPE_KEYS = (*GEOMETRY_AND_COLOUR, *MIXING, "copy_paste_mode", "augmentations", *SELECTION)
"""Every Ultralytics setting that changes the pixels or the labels of a training item; `imgsz` stands beside them."""

BATCH_PIXEL_KEYS = {"multi_scale": (0, 0.0, False, None), "rect": (False, None)}
"""Settings that change pixels per batch, with the only values under which a stored target still fits."""


@dataclass(frozen=True)
class Recipe:
    """The augmentation recipe: one value for each of `RECIPE_KEYS`."""

    values: tuple[tuple[str, Any], ...]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the recipe inside a full mapping of Ultralytics settings; keys that it lacks are None."""
        return cls(tuple((key, _plain_value(settings.get(key))) for key in RECIPE_KEYS))

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as a mapping that JSON can hold."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.values}

    def for_view(self, view: View) -> dict[str, Any]:
        """Return the settings of one kind of view: plain views mix no images (what `close_mosaic` gives)."""
        settings = self.to_json()
        return settings if view.kind == "mixed" else {**settings, **dict.fromkeys(MIXING, 0.0)}

    def differences(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return {key: (recipe's value, other value)} of the recipe keys that `settings` names with another value."""
        mine = dict(self.values)
        return {
            key: (mine[key], settings[key])
            for key in RECIPE_KEYS
            if key in settings and mine[key] != _plain_value(settings[key])
        }


def _plain_value(value: Any) -> Any:
    """Make equal settings compare equal: 1 and 1.0, [a, b] and (a, b)."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list | tuple):
        return tuple(_plain_value(item) for item in value)
    return value
