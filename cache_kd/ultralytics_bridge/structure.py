"""In: a model. Out: what it computes beside its weights: its layers, how they are joined and their constants."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from cache_kd.fingerprint import digest_json, digest_tensors

PASSING = frozenset(
    {
        # What training, exporting or the last image left behind, and what names or counts instead of computing.
        *("training", "inplace", "momentum", "export", "format", "dynamic", "max_det", "agnostic_nms"),
        *("anchors", "strides", "shape", "type", "np"),
    }
)
STOCK = ("torch.", "ultralytics.")


def digest_structure(model: nn.Module) -> str:
    """Return sha256 over the layers of a model in order: name, class, constants (strides, eps, where inputs come from).

    The model's own attributes count for nothing: they say how it was trained and where its file was. Nor do weights,
    which have a digest of their own. Of a class of the user's the source counts.
    """
    layers = [
        [name, type(module).__name__, _source(type(module)), _constants(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if name
    ]
    return digest_json(layers)


def _constants(module: nn.Module) -> dict[str, str]:
    found = {}
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or key in PASSING or value is None:
            continue
        if isinstance(value, Tensor):
            found[key] = digest_tensors({key: value.float()})
        elif _is_plain(value):
            found[key] = repr(tuple(value) if isinstance(value, list | tuple) else value)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


def _source(kind: type[nn.Module]) -> str:
    if f"{kind.__module__}.".startswith(STOCK):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made while the program ran: there is no file to read
        return ""
