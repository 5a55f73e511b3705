"""In: units that are to be made. Out: those that still may be tried, and a line about those that may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cache_kd.cache.attempts import MAX_ATTEMPTS
from cache_kd.cache.store import Place
from cache_kd.cache.writer import CacheWriter
from cache_kd.errors import UnitsError
from cache_kd.teacher.extract import Unit

_NAMED = 4


@dataclass(frozen=True)
class Quarantine:
    """The attempts at some units of a cache, as the cache counts them."""

    writer: CacheWriter
    units: Sequence[Unit]
    path: Place

    def lift(self) -> None:
        """Have all of the units tried again."""
        for unit in self._given_up():
            self.writer.attempts.clear(unit.view, unit.shard)

    def open(self) -> list[Unit]:
        """Return the units that have an attempt left."""
        given_up = self._given_up()
        return [unit for unit in self.units if unit not in given_up]

    def check(self) -> None:
        """Raise `UnitsError` if any of the units has no attempt left."""
        if given_up := self._given_up():
            raise UnitsError(
                f"{self.path}: {len(given_up)} of {len(self.units)} units are quarantined after {MAX_ATTEMPTS} "
                f"attempts: {named(given_up)}; the rest is committed; to try them again, type the same with --retry"
            )

    def _given_up(self) -> dict[Unit, str]:
        found = self.writer.attempts.given_up()
        return {unit: found[unit.view, unit.shard] for unit in self.units if (unit.view, unit.shard) in found}


def named(units: Mapping[Unit, str]) -> str:
    """Return units and what befell them, the first ones, on one line."""
    lines = [f"{unit} ({reason})" for unit, reason in units.items()]
    more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return "; ".join(lines[:_NAMED]) + more
