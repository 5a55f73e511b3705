"""Targets that were coded twice may be off by the bounds of both codings, and are where both err the same way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cache_kd.codecs import ViewCodec
from cache_kd.pipeline.identity import RECODED
from cache_kd.pipeline.target_errors import fidelities, named_targets, pixel_room, target_errors
from cache_kd.structures import HeadSpec, SampleTargets, Tap, ViewSample

HEAD = HeadSpec((Tap("P3", 8, 8),), 1, ("cell",))
SIDE = 64
SHAPE = (8, 8, 8)


def codec(fidelity: str) -> ViewCodec:
    return ViewCodec.create(fidelity, HEAD, SIDE, ("features",))


def said(values: np.ndarray) -> SampleTargets:
    return SampleTargets((values,), None, None, np.zeros(64, np.float32), None, None, None)


def coded(name: str, values: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the row of a map at a fidelity, and the map as it is read back."""
    row = codec(name).encode(said(values))
    features = codec(name).decode_one(row).features
    assert features is not None
    return row, features[0][0].numpy()


def crowded(rng: np.random.Generator, near: float) -> np.ndarray:
    """Return a map with one value at `near` of a map's range, many others just above it, and a far peak."""
    values = rng.normal(0, 1, SHAPE).astype(np.float32)
    values.reshape(-1)[:200] = near + 0.14 * rng.random(200)
    values.reshape(-1)[0] = near
    return values


def worst_case() -> np.ndarray:
    """Return a map whose value 0 errs the same way in both codings: alone at the near edge of a crowded cell, twice."""
    best, most = np.zeros(SHAPE, np.float32), 0.0
    rng = np.random.default_rng(0)
    for near in np.linspace(-0.5, 0.5, 101):
        values = crowded(rng, float(near))
        row, _ = coded("small", coded("default", values)[1])
        alone = target_errors(codec("small"), row, said(values), coded=("small",))["features P3"]
        if alone > most:
            best, most = values, alone
    return best


def test_two_codings_err_by_more_than_the_last_bound_and_not_by_more_than_both() -> None:
    values = worst_case()
    row, _ = coded("small", coded("default", values)[1])
    live = said(values)
    assert target_errors(codec("small"), row, live, coded=("small",))["features P3"] > 1
    assert target_errors(codec("small"), row, live, coded=("default", "small"))["features P3"] <= 1
    once, _ = coded("small", values)
    assert target_errors(codec("small"), once, live, coded=("small",))["features P3"] <= 1


def test_half_precision_before_counts_by_its_own_bound() -> None:
    """Far from 0 half precision is coarser than the steps of a map that hardly varies."""
    values = (1000 + np.random.default_rng(0).random(SHAPE)).astype(np.float32)
    row, _ = coded("default", coded("exact", values)[1])
    live = said(values)
    assert target_errors(codec("default"), row, live, coded=("default",))["features P3"] > 1
    assert target_errors(codec("default"), row, live, coded=("exact", "default"))["features P3"] <= 1
    assert target_errors(codec("default"), row, said(values + 2), coded=("exact", "default"))["features P3"] > 1


def test_the_codings_are_those_of_the_chain() -> None:
    chain = [{"fidelity": name, "identity": "0" * 64} for name in ("exact", "default", "default")]
    assert fidelities({}, codec("small")) == ("small",)
    assert fidelities({RECODED: chain}, codec("small")) == ("exact", "default", "small")
    assert fidelities({RECODED: chain}, codec("default")) == ("exact", "default"), "stores alone were dropped"


class Brightness:
    """Stands for a teacher whose map is the mean level of the pixels; remembers what it was shown."""

    head, forward_seconds = HEAD, 0.0

    def __call__(self, views: list[ViewSample], *, batch: int) -> list[SampleTargets]:
        return [said(np.full(SHAPE, view.pixels.mean(), np.float32)) for view in views]


@pytest.mark.parametrize("levels", [1, 2])
def test_the_room_is_thrice_what_such_a_change_makes(levels: int) -> None:
    view = ViewSample(np.full((3, SIDE, SIDE), 100, np.uint8), np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    white = replace(view, pixels=np.full((3, SIDE, SIDE), 255, np.uint8))
    change = np.zeros(view.pixels.shape, np.int16)
    change[:, :, ::2] = levels  # every other column is brighter
    rooms = pixel_room(codec("default"), Brightness(), [view, white], change, batch=2)
    assert rooms == [{"features P3": 1.5 * levels}] * 2, "white cannot get brighter, but darker"
    values = np.zeros(SHAPE, np.float32)
    row, _ = coded("exact", values)
    off = said(values + 0.5 * levels)
    assert target_errors(codec("exact"), row, off, coded=("exact",))["features P3"] > 1
    errors = target_errors(codec("exact"), row, off, coded=("exact",), room=rooms[0])
    assert errors["features P3"] == pytest.approx(1 / 3, rel=1e-2)
    assert set(errors) == set(named_targets(codec("exact"), off))
