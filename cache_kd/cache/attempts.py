"""In: a unit that is begun. Out: how often that was tried, counted in the cache itself before anything can go wrong."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, final

from cache_kd.cache.files import brief, parse_json
from cache_kd.cache.store import Store
from cache_kd.errors import DamagedCacheError
from cache_kd.fingerprint import canonical_json
from cache_kd.structures import View

ATTEMPTS = "attempts"
MAX_ATTEMPTS = 3
_MAX_BYTES = 8192
_NAME = re.compile(rf"{ATTEMPTS}/((?:mixed|plain)-\d+)-(\d+)\.(\d)\.json")


@final
@dataclass(frozen=True)
class Attempts:
    """The attempts at the units of one cache that are not finished: a file each, created once, on any store.

    An attempt is written down before it begins, so that one which kills its process counts. One that was interrupted on
    purpose is withdrawn; those of a finished unit are deleted.
    """

    store: Store

    def begin(self, view: View, shard: int) -> int | None:
        """Write down that a unit is begun; returns which attempt this is, from 1, or None if none is left."""
        content = canonical_json({"host": platform.node(), "pid": os.getpid(), "begun": _now()})
        for number in range(1, MAX_ATTEMPTS + 1):
            if self.store.create(_path(view, shard, number), content):
                return number
        return None

    def fail(self, view: View, shard: int, reason: str) -> None:
        """Write down why the last attempt at a unit failed, unless that is known already."""
        for number in range(MAX_ATTEMPTS, 0, -1):
            if self.store.exists(_path(view, shard, number)):
                self.store.create(_fault(view, shard, number), canonical_json({"reason": brief(reason, 1000)}))
                return

    def withdraw(self, view: View, shard: int, number: int) -> None:
        """Forget an attempt that was interrupted: nothing is known against the unit."""
        self.store.delete(_path(view, shard, number))

    def excuse(self, view: View, shard: int) -> None:
        """Forget the last attempt unless it is known why it failed: its process was told to end."""
        for number in range(MAX_ATTEMPTS, 0, -1):
            if self.store.exists(_path(view, shard, number)):
                if not self.store.exists(_fault(view, shard, number)):
                    self.withdraw(view, shard, number)
                return

    def clear(self, view: View, shard: int, numbers: int = MAX_ATTEMPTS) -> None:
        """Forget the first `numbers` attempts at a unit: it is finished, or is to be tried again."""
        for number in range(numbers, 0, -1):
            if number < numbers or numbers == MAX_ATTEMPTS:
                self.store.delete(_fault(view, shard, number))
            self.store.delete(_path(view, shard, number))

    def counted(self) -> dict[tuple[View, int], int]:
        """Return how many attempts at each unit are written down."""
        found: dict[tuple[View, int], int] = {}
        for path, _ in self.store.files(ATTEMPTS):
            if match := _NAME.fullmatch(path):
                unit = (View.parse(match[1]), int(match[2]))
                found[unit] = max(found.get(unit, 0), int(match[3]))
        return found

    def given_up(self) -> dict[tuple[View, int], str]:
        """Return the units that have no attempt left, in order, and why the last one failed."""
        return {unit: self._reason(*unit) for unit, count in sorted(self.counted().items()) if count >= MAX_ATTEMPTS}

    def reason(self, view: View, shard: int) -> str:
        """Return why the last attempt at a unit failed, as far as anybody could write it down."""
        return self._reason(view, shard)

    def forget(self, finished: Iterable[tuple[View, int]]) -> None:
        """Delete what is left of the attempts at finished units, and the folder if nothing is."""
        counted = self.counted()
        for unit in {*finished} & counted.keys():
            self.clear(*unit)
        if not counted or not self.counted():
            self.store.delete_below(ATTEMPTS)

    def _reason(self, view: View, shard: int) -> str:
        for number in range(MAX_ATTEMPTS, 0, -1):
            if reason := self._read(_fault(view, shard, number)).get("reason"):
                return str(reason)
            begun = self._read(_path(view, shard, number))
            if begun:
                return f"process {begun.get('pid')} on {begun.get('host')}, begun {begun.get('begun')}, did not end it"
        return "nobody knows why"

    def _read(self, path: str) -> dict[str, Any]:
        try:
            content = self.store.find(path, _MAX_BYTES)
            data = parse_json(content, path) if content is not None else {}
        except DamagedCacheError:
            return {}
        return data if isinstance(data, dict) else {}


def _path(view: View, shard: int, number: int) -> str:
    return f"{ATTEMPTS}/{view.name}-{shard:05d}.{number}.json"


def _fault(view: View, shard: int, number: int) -> str:
    return f"{ATTEMPTS}/{view.name}-{shard:05d}.{number}.fault.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
