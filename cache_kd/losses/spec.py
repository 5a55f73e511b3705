"""In: `NAME:key=value,…` as typed or written in a recipe. Out: a checked `LossSpec`, and the module it stands for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache_kd import losses
from cache_kd.errors import SettingError, choices
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.options import Allowed, Option, at_least, between, whole, written
from cache_kd.structures import HeadSpec

TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class LossSpec:
    """A loss as chosen for a run; `str` gives its canonical text, which `parse_loss` reads back as an equal spec.

    Attributes:
        name: key in `LOSSES`.
        weight: factor of the term, 0 or more.
        options: (name, value) of those that were given, in the order of the method's signature.
        warmup: epochs over which the factor grows linearly to its full value, as in DKD; 0 starts with it.
        cosine: share of the factor that is left in the last epoch of a fall along half a cosine; 1 does not fall.
        until: epochs after which the term is switched off and costs nothing; 0 never.
        balance: share of the gradient on the student's neck at which the factor is held, `weight` being its first
            guess; 0 does not hold it.
    """

    name: str
    weight: float
    options: tuple[tuple[str, Option], ...] = ()
    warmup: float = 0.0
    cosine: float = 1.0
    until: int = 0
    balance: float = 0.0

    def __str__(self) -> str:
        common = [(key, getattr(self, key)) for key in COMMON]
        changed = [(key, value) for key, value in common if key == "weight" or value != COMMON[key].default]
        return f"{self.name}:" + ",".join(f"{key}={written(value)}" for key, value in (*changed, *self.options))

    def schedule(self, epoch: int, epochs: int) -> float:
        """Return what the factor is multiplied by in `epoch`, from 0, of `epochs`; 0 when the term is switched off."""
        if self.until and epoch >= self.until:
            return 0.0
        rise = min((epoch + 1) / self.warmup, 1.0) if self.warmup else 1.0
        passed = epoch / (epochs - 1) if epochs > 1 else 0.0
        return rise * (self.cosine + (1 - self.cosine) * (1 + math.cos(math.pi * min(passed, 1.0))) / 2)

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of a cache, see `DistillLoss.needs`."""
        return self._method.needs_for(self._all_options)

    @property
    def reads(self) -> frozenset[str]:
        """What it reads beside outputs and targets, see `DistillLoss.reads`."""
        return self._method.reads_for(self._all_options)

    @property
    def student_layers(self) -> tuple[str, ...]:
        """The student's layers that it compares, beside the head's inputs."""
        return self._method.student_layers(self._all_options)

    @property
    def _method(self) -> type[DistillLoss]:
        return losses.LOSSES[self.name]

    @property
    def _all_options(self) -> dict[str, Option]:
        return {**option_defaults(self._method), **dict(self.options)}


@dataclass(frozen=True)
class CommonOption:
    """An option of every loss: its type, default and rule."""

    kind: type[Any]
    default: Option | None
    allowed: Allowed


COMMON: dict[str, CommonOption] = {
    "weight": CommonOption(float, None, at_least(0)),
    "warmup": CommonOption(float, 0.0, at_least(0)),
    "cosine": CommonOption(float, 1.0, between(0, 1)),
    "until": CommonOption(int, 0, whole(0)),
    "balance": CommonOption(float, 0.0, between(0, 0.9)),
}
"""Options that every loss has; the default weight is the method's own."""


def parse_loss(text: str) -> LossSpec:
    """Return the spec written as `NAME` or `NAME:key=value,key=value`; a list is written `layers=P3,P4`.

    Raises:
        SettingError: no such loss or option, a value of the wrong type or out of range, or an option given twice.
    """
    name, colon, rest = text.strip().partition(":")
    if name not in losses.LOSSES:
        raise SettingError(f"no loss {name!r} in {text!r}; {choices(name, losses.LOSSES)}; see cache-kd losses")
    method = losses.LOSSES[name]
    types = {**{key: common.kind for key, common in COMMON.items()}, **option_types(method)}
    values: dict[str, Option] = {}
    for key, value in _pairs(name, text, rest, types) if colon else ():
        if key in values:
            raise SettingError(f"loss {name}: {key} is given twice in {text!r}; give it once")
        values[key] = _converted(method, key, value, types[key])
    for key, given in values.items():
        if key in COMMON and not COMMON[key].allowed.test(given):
            raise SettingError(
                f"loss {name}: {key}={written(given)} is not allowed; allowed: {COMMON[key].allowed.text}"
            )
    common: dict[str, Any] = {key: values.pop(key) for key in COMMON if key in values}
    if common.get("balance") and common.get("weight") == 0:
        raise SettingError(f"loss {name}: weight=0 cannot be held at balance={common['balance']:g}; allowed: above 0")
    method.check_options(values)
    ordered = tuple((key, values[key]) for key in types if key in values)
    return LossSpec(name, options=ordered, **{"weight": method.default_weight, **common})


def _pairs(name: str, text: str, rest: str, types: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) as written; what follows a list without a key of its own belongs to the list."""
    open_list: list[str] = []
    for part in rest.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if not open_list:
                raise SettingError(f"loss {name}: {part!r} in {text!r} is not key=value; {choices(key, types)}")
            open_list.append(key)
            continue
        if key not in types:
            raise SettingError(f"loss {name}: no option {key!r}; {choices(key, types)}")
        if open_list:
            yield open_list[0], ",".join(open_list[1:])
            open_list = []
        if types[key] == tuple[str, ...]:
            open_list = [key, value]
        else:
            yield key, value
    if open_list:
        yield open_list[0], ",".join(open_list[1:])


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


def option_types(method: type[DistillLoss]) -> dict[str, Any]:
    """Return {option: type} of a method's own options, in the order of its signature; unannotated: the default's."""
    return {
        parameter.name: _default_type(parameter) if parameter.annotation is parameter.empty else parameter.annotation
        for parameter in _own_options(method)
    }


def _default_type(parameter: inspect.Parameter) -> Any:
    return tuple[str, ...] if isinstance(parameter.default, tuple) else type(parameter.default)


def option_defaults(method: type[DistillLoss]) -> dict[str, Option]:
    """Return {option: default} of a method's own options."""
    return {parameter.name: parameter.default for parameter in _own_options(method)}


def _own_options(method: type[DistillLoss]) -> list[inspect.Parameter]:
    parameters = inspect.signature(method.__init__, eval_str=True).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def _converted(method: type[DistillLoss], key: str, text: str, wanted: Any) -> Option:
    if wanted == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",")) if text else ()
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
    allowed = COMMON[key].allowed if key in COMMON else method.allowed.get(key)
    words = {str: "a word", bool: "true, false", int: "whole numbers", float: "finite numbers"}
    rule = allowed.text if allowed else words[wanted]
    raise SettingError(f"loss {method.name}: {key}={text} is not allowed; allowed: {rule}")
