"""In: YAML files and KEY=VALUE words. Out: plain mappings. The only importer of yaml."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from cache_kd.errors import InputDataError, MissingFileError, SettingError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, read without constructing objects.

    Raises:
        MissingFileError: There is no such file.
        InputDataError: It is not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        raise MissingFileError(f"no such file: {path}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bad dates and endless nesting are not YAMLError
        first_line = str(error).splitlines()[0]
        raise InputDataError(f"{path} is not a YAML file: {first_line}") from None
    if not isinstance(content, dict):
        raise InputDataError(f"{path} must hold `key: value` lines, it holds a {type(content).__name__}")
    return content


def to_yaml(content: dict[str, Any]) -> str:
    """Return `content` as YAML text in the given order of keys."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def parse_pairs(words: Iterable[str]) -> dict[str, Any]:
    """Return {key: value} of words like `epochs=50`, values read as Ultralytics' own command line reads them.

    Raises:
        SettingError: A word is not of the form KEY=VALUE, or a key is given twice.
    """
    pairs: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not key or not value:
            raise SettingError(f"{word!r} is not of the form KEY=VALUE, for example epochs=50")
        if key in pairs:
            raise SettingError(f"{key} is given twice: {pairs[key]!r} and {value!r}")
        pairs[key] = _value(value)
    return pairs


def _value(text: str) -> Any:
    constants = {"none": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
