"""In: frozen dataclasses and parsed JSON. Out: the one from the other, every fault with its place."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

KEY = "key"  # of a field's metadata: its name in JSON, where that is no Python name


class FieldFault(ValueError):
    """A value that a field cannot hold: where it stands, what it is, what is allowed."""


def json_name(field: dataclasses.Field[Any]) -> str:
    """Return the name that a field has in JSON."""
    return str(field.metadata.get(KEY, field.name))


def to_json(value: Any) -> Any:
    """Return what JSON can hold of a dataclass, a mapping, a sequence or a value; NaN and infinity become null."""
    if dataclasses.is_dataclass(value):
        return {json_name(field): to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """Return `value` as `kind`: a dataclass, str, int, float, bool, X | None, tuple[X, ...], Mapping[str, X] or Any.

    Raises:
        FieldFault: A key is missing or unknown, or a value has another type; the line begins with where it stands.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(choice for choice in arguments if choice is not types.NoneType)
        return None if value is None else from_json(inner, value, where)
    if origin is tuple:
        return tuple(from_json(arguments[0], item, f"{where}[{at}]") for at, item in enumerate(_of(list, value, where)))
    if origin is not None and issubclass(origin, Mapping):
        items = _of(dict, value, where).items()
        return {key: from_json(arguments[1], item, f"{where}.{key}") for key, item in items}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _of(kind, value, where)


NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def _of(kind: type, value: Any, where: str) -> Any:
    fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise FieldFault(f"{where or 'the whole'} is {short(value)}; allowed: {NAMES[kind]}")
    return value


def short(value: Any) -> str:
    """Return a value for a message, cut after 40 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    content = _of(dict, value, where)
    fields = dataclasses.fields(kind)
    faults = list(_faults([json_name(field) for field in fields], content))
    if faults:
        raise FieldFault(f"{where + ' ' if where else ''}{', '.join(faults)}")
    hints = typing.get_type_hints(kind)
    inside = f"{where}." if where else ""
    return kind(
        **{
            field.name: from_json(hints[field.name], content[json_name(field)], f"{inside}{json_name(field)}")
            for field in fields
        }
    )


def _faults(names: list[str], content: dict[str, Any]) -> Iterator[str]:
    missing = [name for name in names if name not in content]
    unknown = [name for name in content if name not in names]
    if missing:
        yield f"lacks {', '.join(missing)}"
    if unknown:
        yield f"has unknown {', '.join(unknown)} (known: {', '.join(names)})"
