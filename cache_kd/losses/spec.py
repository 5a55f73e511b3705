"""In: `NAME:key=value,…` as typed or written in a recipe. Out: a checked `LossSpec`, and the module it stands for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache_kd import losses
from cache_kd.errors import SettingError, choices
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.options import Option, at_least
from cache_kd.structures import HeadSpec

TRUTH = {"true": True, "false": False}
WEIGHTS = at_least(0)


@dataclass(frozen=True)
class LossSpec:
    """A loss as chosen for a run; `str` gives its canonical text, which `parse_loss` reads back as an equal spec.

    Attributes:
        name: key in `LOSSES`.
        weight: factor of the term, 0 or more.
        options: (name, value) of those that were given, in the order of the method's signature.
    """

    name: str
    weight: float
    options: tuple[tuple[str, Option], ...] = ()

    def __str__(self) -> str:
        pairs = (("weight", self.weight), *self.options)
        return f"{self.name}:" + ",".join(f"{key}={_written(value)}" for key, value in pairs)


def parse_loss(text: str) -> LossSpec:
    """Return the spec written as `NAME` or `NAME:key=value,key=value`.

    Raises:
        SettingError: no such loss or option, a value of the wrong type or out of range, or an option given twice.
    """
    name, colon, rest = text.strip().partition(":")
    if name not in losses.LOSSES:
        raise SettingError(f"no loss {name!r} in {text!r}; {choices(name, losses.LOSSES)}; see cache-kd losses")
    method = losses.LOSSES[name]
    types: dict[str, type[Any]] = {"weight": float, **_option_types(method)}
    values: dict[str, Option] = {}
    for pair in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise SettingError(f"loss {name}: {pair!r} in {text!r} is not key=value; {choices(key, types)}")
        if key not in types:
            raise SettingError(f"loss {name}: no option {key!r}; {choices(key, types)}")
        if key in values:
            raise SettingError(f"loss {name}: {key} is given twice in {text!r}; give it once")
        values[key] = _converted(method, key, value, types[key])
    weight = float(values.pop("weight", method.default_weight))
    if not WEIGHTS.test(weight):
        raise SettingError(f"loss {name}: weight={weight:g} is not allowed; allowed: {WEIGHTS.text}")
    method.check_options(values)
    return LossSpec(name, weight, tuple((key, values[key]) for key in types if key in values))


def parse_losses(texts: Sequence[str]) -> tuple[LossSpec, ...]:
    """Return the specs of several texts, in their order; raises `SettingError` when one loss is named twice."""
    specs = tuple(parse_loss(text) for text in texts)
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(
                f"loss {name} is given {names.count(name)} times; give each loss once: --loss {name}:weight=…"
            )
    return specs


def build_loss(spec: LossSpec, teacher: HeadSpec, student: HeadSpec) -> DistillLoss:
    """Return the module of a spec with fresh adapters for these heads; raises as the method's `__init__` does."""
    return losses.LOSSES[spec.name](teacher, student, **dict(spec.options))


def _option_types(method: type[DistillLoss]) -> dict[str, type[Any]]:
    parameters = inspect.signature(method.__init__, eval_str=True).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _converted(method: type[DistillLoss], key: str, text: str, wanted: type[Any]) -> Option:
    if wanted is str and text:
        return text
    if wanted is bool and text in TRUTH:
        return TRUTH[text]
    if wanted in (int, float):
        try:
            value: float = wanted(text)
        except ValueError:
            pass
        else:
            if math.isfinite(value):
                return value
    allowed = {"weight": WEIGHTS, **method.allowed}.get(key)
    words = {str: "a word", bool: "true, false", int: "whole numbers", float: "finite numbers"}
    rule = allowed.text if allowed else words[wanted]
    raise SettingError(f"loss {method.name}: {key}={text} is not allowed; allowed: {rule}")


def _written(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
