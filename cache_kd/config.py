"""In: YAML files and KEY=VALUE words. Out: plain mappings. The only importer of yaml."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cache_kd.errors import InputDataError, MissingFileError, SettingError

UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(kB|MB|GB|TB|B)", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Return the bytes that `text` says, at least 1; raises `SettingError` naming `option` for anything else."""
    match = _SIZE.fullmatch(text.strip())
    factors = {unit.upper(): size for unit, size in UNITS.items()}
    count = int(float(match[1]) * factors.get(match[2].upper(), 1.0)) if match else 0
    if count < 1:
        raise SettingError(f"{option} {text!r} is no size; allowed: a number and a unit, as 500MB, 40GB, 1.5TB")
    return count


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


Key = tuple[str, ...]
"""The way to a value: the keys above it and its own; entries of lists are counted from 0."""


@dataclass
class MarkedYaml:
    """A YAML mapping that remembers where everything stands.

    Attributes:
        content: the values. places: by the way to a value, where its key stands: `FILE:LINE`, or the word that set it.
        faults: (place, text) of what is wrong with the YAML itself.
    """

    file: str
    content: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def place(self, *key: str) -> str:
        """Return where a value stands, or the nearest one around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.file)

    def set(self, word: str) -> None:
        """Change or add the value that a word like `settings.lr0=0.01` names; what is wrong becomes a fault."""
        place = f"--set {word}"
        way, equals, text = word.partition("=")
        *above, last = keys = tuple(way.strip().split("."))
        if not equals or not all(keys):
            self.faults.append((place, "is not of the form KEY.KEY=VALUE, for example --set epochs=50"))
            return
        table: Any = self.content
        for key in above:
            table = table.setdefault(key, {}) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            self.faults.append((place, f"{'.'.join(above)} holds no keys"))
            return
        try:
            node = yaml.compose(text, yaml.SafeLoader)
            table[last] = self._value(node, keys, ()) if node is not None else None
        except yaml.YAMLError as error:
            self.faults.append((place, f"the value is not YAML: {str(error).splitlines()[0]}"))
        self.places.update({known: place for known in self.places if known[: len(keys)] == keys} | {keys: place})
        for length in range(1, len(keys)):
            self.places.setdefault(keys[:length], place)

    def _value(self, node: yaml.Node, key: Key, around: tuple[int, ...]) -> Any:
        if id(node) in around:
            self.faults.append((self.place(*key), f"{'.'.join(key)} contains itself"))
            return None
        around = (*around, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._table(node, key, around)
        if isinstance(node, yaml.SequenceNode):
            return [self._entry(item, (*key, str(number)), around) for number, item in enumerate(node.value)]
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self.faults.append((self.place(*key), f"{'.'.join(key)}: {str(error).splitlines()[0]}"))
            return None
        return _number(value) if isinstance(node, yaml.ScalarNode) and node.style is None else value

    def _entry(self, node: yaml.Node, key: Key, around: tuple[int, ...]) -> Any:
        self.places[key] = self._line(node)
        return self._value(node, key, around)

    def _table(self, node: yaml.MappingNode, key: Key, around: tuple[int, ...]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in node.value:
            # As written: YAML reads `on:` as true and `1:` as a number.
            text = name.value if isinstance(name, yaml.ScalarNode) else str(name.start_mark)
            own = (*key, text)
            if text in table:
                self.faults.append((self._line(name), f"{'.'.join(own)} is there twice, first in {self.places[own]}"))
                continue
            self.places[own] = self._line(name)
            table[text] = self._value(value, own, around)
        return table

    def _line(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"


def read_marked(path: Path) -> MarkedYaml:
    """Return the mapping in a YAML file with the line of every value; what is wrong with it stands in its `faults`.

    Raises:
        MissingFileError: There is no such file.
    """
    marked = MarkedYaml(str(path))
    try:
        node = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except (FileNotFoundError, IsADirectoryError):
        raise MissingFileError(f"no such file: {path}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        marked.faults.append((f"{path}{line}", f"not YAML: {error.problem}"))
        return marked
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        marked.faults.append((str(path), f"not YAML: {str(error).splitlines()[0]}"))
        return marked
    if not isinstance(node, yaml.MappingNode):
        marked.faults.append((f"{path}:1", "must hold `key: value` lines"))
        return marked
    marked.places[()] = f"{path}:1"
    marked.content = marked._table(node, (), (id(node),))
    return marked


def _number(value: Any) -> Any:
    """Return the number in a text like 1e-3, which YAML 1.1 reads as a word for want of a dot."""
    if not isinstance(value, str) or "e" not in value.lower():
        return value
    try:
        return float(value)
    except ValueError:
        return value


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
