"""Every unit is in one part, parts are alike in size, and Slurm's arrays name theirs or are refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_kd.errors import SettingError
from cache_kd.pipeline.parts import Part, part_holding, slurm_part


@given(st.integers(0, 200), st.integers(1, 20))
def test_every_unit_is_in_one_part(units: int, count: int) -> None:
    parts = [Part(number, count).of(range(units)) for number in range(1, count + 1)]
    assert sorted(unit for part in parts for unit in part) == list(range(units))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for unit in range(units):
        assert unit in part_holding(unit, count).of(range(units))


@pytest.mark.parametrize("text", ["0/3", "4/3", "a/b", "3", "-1/3", "1/0", "1/3/5", "", "1.0/3", "٣/٩"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=rf"^--part {re.escape(repr(text))}; allowed: 1/16 to 16/16"):
        Part.parse(text)


def array(**values: int | str) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({}, None),
        (array(ID=3), None),
        (array(ID=3, COUNT=16, MIN=0, MAX=15, STEP=1), Part(4, 16)),
        (array(ID=3, COUNT=16, MIN=1, MAX=16, STEP=1), Part(3, 16)),
        (array(ID=30, COUNT=4, MIN=10, MAX=40, STEP=10), Part(3, 4)),
        (array(ID=0, COUNT=3, MIN=0), Part(1, 3)),
        (array(ID=7, COUNT=1, MIN=7, MAX=7), Part(1, 1)),
    ],
)
def test_an_array_names_its_parts(variables: dict[str, str], part: Part | None) -> None:
    found = slurm_part(variables)
    assert (found[0] if found else None) == part
    if found:
        assert found[1].startswith(f"part {part}, by SLURM_ARRAY_TASK_ID=") and "--part 1/1" in found[1]


@pytest.mark.parametrize(
    "variables",
    [
        array(ID=3, COUNT=2, MIN=3, MAX=7),
        array(ID=7, COUNT=3, MIN=1, MAX=7, STEP=1),
        array(ID=5, COUNT=4, MIN=10, MAX=40, STEP=10),
        array(ID=15, COUNT=4, MIN=10, MAX=40, STEP=10),
        array(ID="x", COUNT=4),
        array(ID=1, COUNT=4, STEP=0),
        array(ID=9, COUNT=4, MIN=0),
    ],
)
def test_an_array_with_gaps_is_refused(variables: dict[str, str]) -> None:
    with pytest.raises(SettingError, match=r"not one even range, so the part is not known; name it: --part 3/16$"):
        slurm_part(variables)
