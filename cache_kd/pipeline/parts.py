"""In: words such as 3/16, or what Slurm says of an array. Out: which part of an extraction's units is meant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cache_kd.errors import SettingError

T = TypeVar("T")
_PART = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True)
class Part:
    """One of `count` parts of a list, numbered from 1: every machine cuts the same list in the same way."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part written as 3/16; raises `SettingError` for anything else."""
        match = _PART.fullmatch(text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise SettingError(f"--part {text!r}; allowed: 1/16 to 16/16 for sixteen parts, for example 3/16")
        return cls(int(match[1]), int(match[2]))

    def of(self, units: Sequence[T]) -> list[T]:
        """Return every `count`-th unit: each part has some of every view."""
        return list(units[self.number - 1 :: self.count])


def part_holding(index: int, count: int) -> Part:
    """Return which of `count` parts holds unit `index` of the list."""
    return Part(index % count + 1, count)


def slurm_part(environment: Mapping[str, str]) -> tuple[Part, str] | None:
    """Return the part of a task of a Slurm array and the line that says so; None outside of one.

    An array may begin anywhere and have a step: --array=10-40:10 has four tasks.

    Raises:
        SettingError: an array of single numbers with gaps, as when some tasks are submitted again: which part a task
            was, only the user knows.
    """
    names = {name: environment.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT", "MIN", "MAX", "STEP")}
    if not names["ID"] or not names["COUNT"]:
        return None
    says = ", ".join(f"SLURM_ARRAY_TASK_{name}={value}" for name, value in names.items() if value)
    try:
        number, count = int(names["ID"]), int(names["COUNT"])
        first, step = int(names["MIN"] or 0), int(names["STEP"] or 1)
        last = int(names["MAX"]) if names["MAX"] else first + (count - 1) * step
        index, rest = divmod(number - first, step)
        even = first + (count - 1) * step == last
    except (ValueError, ZeroDivisionError):
        even, index, rest, count = False, 0, 0, 0
    if not even or rest or not 0 <= index < count:
        raise SettingError(f"{says}: not one even range, so the part is not known; name it: --part 3/16")
    part = Part(index + 1, count)
    return part, f"part {part}, by {says}; all of it: --part 1/1"
