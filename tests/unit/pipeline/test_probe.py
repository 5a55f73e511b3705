"""A probe looks at more items while their bytes scatter, up to a limit, and says how well it knows their mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cache_kd.codecs import ViewCodec
from cache_kd.pipeline.probe import ITEMS, MOST_ITEMS, TOLERANCE, Probed, probe, sample_order
from cache_kd.structures import HeadSpec, SampleTargets, Tap, View, ViewSample

HEAD = HeadSpec((Tap("P3", 8, 8),), 1, ("cell",))
CODEC = ViewCodec.create("default", HEAD, 64, ("features",))
VIEWS = (View("mixed", 0), View("mixed", 1))
IMAGES = 400
BATCH = 8


class Images:
    """Stands for a data set; the first pixel says how much of a view's map is noise, in 255ths."""

    packing = None
    decoded = ()

    def __init__(self, spread: float) -> None:
        self.spread = spread

    def __len__(self) -> int:
        return IMAGES

    def image_name(self, index: int) -> str:
        return f"{index}.jpg"

    def sample(self, view: View, index: int) -> ViewSample:
        rng = np.random.default_rng([view.number, index])
        noise = 127 + 127 * self.spread * (1 if rng.random() < 0.5 else -1)
        pixels = np.full((3, 64, 64), noise, np.uint8)
        return ViewSample(pixels, np.zeros(0, np.int64), np.zeros((0, 4), np.float32))


class Noise:
    """Stands for a teacher; of its map as much is noise as the pixels say, the rest is flat."""

    head, forward_seconds = HEAD, 0.0

    def __call__(self, views: Any, *, batch: int) -> list[SampleTargets]:
        said = []
        for view in views:
            values = np.zeros(512, np.float32)
            count = 2 * int(view.pixels[0, 0, 0])
            values[:count] = np.random.default_rng(count).normal(0, 1, count)
            said.append(SampleTargets((values.reshape(8, 8, 8),), None, None, np.zeros(64), None, None, None))
        return said


def look(spread: float, most: int = MOST_ITEMS) -> Probed:
    return probe(Images(spread), Noise(), {"default": CODEC}, VIEWS, batch=BATCH, most=most)  # type: ignore[arg-type]


def test_equal_items_need_no_more_than_the_first() -> None:
    found = look(0.0)
    assert found.items == ITEMS and found.error("default") < TOLERANCE / 4


@pytest.mark.parametrize(("most", "expected"), [(MOST_ITEMS, MOST_ITEMS), (48, 48)])
def test_items_that_scatter_ask_for_more_up_to_the_limit(most: int, expected: int) -> None:
    found = look(0.99, most)
    assert found.items == expected and found.error("default") > TOLERANCE


def test_it_stops_once_the_mean_is_known() -> None:
    found = look(0.6)
    assert ITEMS < found.items < MOST_ITEMS and found.error("default") <= TOLERANCE


def test_the_error_is_the_standard_error_of_the_mean() -> None:
    found = look(0.99)
    (arrays,) = found.sizes["default"].values()
    items = np.sum(list(arrays.values()), axis=0)
    assert len(items) == found.items
    assert found.error("default") == pytest.approx(items.std() / np.sqrt(len(items)) / items.mean())
    assert found.item_bytes("default", "mixed") == pytest.approx(items.mean())
    everything = look(0.99, MOST_ITEMS).item_bytes("default", "plain")
    assert everything == pytest.approx(items.mean()), "a kind that was not looked at is like the other"


def test_the_sample_is_spread_and_always_the_same() -> None:
    order = sample_order(VIEWS, IMAGES)
    assert order == sample_order(VIEWS, IMAGES) and len(order) == len(set(order)) == MOST_ITEMS
    assert {view for view, _ in order[:ITEMS]} == set(VIEWS)
    indices = [index for _, index in order[:ITEMS]]
    assert min(indices) < IMAGES / 4 and max(indices) > IMAGES * 3 / 4
    assert sorted(sample_order(VIEWS[:1], 5)) == [(VIEWS[0], index) for index in range(5)]
