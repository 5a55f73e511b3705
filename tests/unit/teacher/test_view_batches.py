"""Batches of units come in order, whole, a unit's own; one that cannot be made takes only its unit with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cache_kd.errors import InputDataError
from cache_kd.structures import View, ViewSample
from cache_kd.teacher.extract import Unit, ViewBatches

SHARD, IMAGES = 4, 10
UNITS = [Unit(View("mixed", number), shard) for number in range(2) for shard in range(3)]


class Images:
    """A data set of numbers, of which some cannot be read."""

    def __init__(self, broken: set[int] | None = None) -> None:
        self.broken = broken or set()

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, key: tuple[View, int]) -> ViewSample:
        view, index = key
        if index in self.broken:
            raise InputDataError(f"view {view.name}, item {index}: gone")
        pixels = np.full((3, 1, 1), index, np.uint8)
        return ViewSample(pixels, np.zeros(0, np.int64), np.zeros((0, 4), np.float32), {})

    def image_name(self, index: int) -> str:
        return str(index)


def batches(units: Any, broken: set[int] | None = None, workers: int = 0) -> ViewBatches:
    dataset: Any = Images(broken)
    return ViewBatches(dataset, units, shard_size=SHARD, batch=3, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_never_straddles_units(workers: int) -> None:
    found = [(made.unit, made.last, [int(view.pixels[0, 0, 0]) for view in made.views]) for made in batches(UNITS)]
    expected = []
    for unit in UNITS:
        first = unit.shard * SHARD
        samples = list(range(first, min(first + SHARD, IMAGES)))
        parts = [samples[:3], samples[3:]] if len(samples) > 3 else [samples]
        expected += [(unit, number == len(parts) - 1, part) for number, part in enumerate(parts)]
    assert found == expected


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (2, 4)])
def test_units_are_taken_when_there_is_room(workers: int, ahead: int) -> None:
    taken: list[Unit] = []

    def units() -> Iterator[Unit]:
        for unit in UNITS:
            taken.append(unit)
            yield unit

    lead = [len(taken) - 1 - UNITS.index(made.unit) for made in batches(units(), workers=workers)]
    assert max(lead) <= max(ahead, 0) and (workers == 0 or max(lead) > 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_gone_takes_its_units_with_it(workers: int) -> None:
    made = batches(UNITS, broken={5}, workers=workers)
    whole, failed = [], []
    for batch in made:
        if isinstance(batch.views, InputDataError):
            failed.append((batch.unit, str(batch.views)))
            made.drop(batch.turn)
        elif batch.last:
            whole.append(batch.unit)
    assert whole == [unit for unit in UNITS if unit.shard != 1]
    assert failed == [(unit, f"view {unit.view.name}, item 5: gone") for unit in UNITS if unit.shard == 1]


def test_a_unit_that_is_taken_again_is_made_again() -> None:
    made = batches([UNITS[0], UNITS[1], UNITS[0]])
    dropped: list[int] = []
    seen: list[tuple[int, Unit]] = []
    for batch in made:
        seen.append((batch.turn, batch.unit))
        if not dropped:
            dropped.append(batch.turn)
            made.drop(batch.turn)
    assert seen == [(0, UNITS[0]), (1, UNITS[1]), (1, UNITS[1]), (2, UNITS[0]), (2, UNITS[0])]
