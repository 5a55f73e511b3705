"""Pairs of 4-bit codes: odd maps, peaks outside the window, windows of groups, and what a neighbour tells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from codec_cases import silu_map
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_kd.codecs.features import Level
from cache_kd.codecs.pair_features import PEAK_SHARE, PairFeatures
from cache_kd.errors import DamagedCacheError


def rows_of(codec: PairFeatures, samples: Sequence[Sequence[np.ndarray]], levels: Sequence[Level]) -> dict:
    rows = [codec.encode(maps, levels) for maps in samples]
    longest = max(len(row["feature_peaks"]) for row in rows) + 3
    peaks = [np.pad(row["feature_peaks"], (0, longest - len(row["feature_peaks"])), constant_values=9) for row in rows]
    columns = {name: np.stack([row[name] for row in rows]) for name in ("features", "feature_tables")}
    return {name: torch.from_numpy(values) for name, values in {**columns, "feature_peaks": np.stack(peaks)}.items()}


def codes_of(values: np.ndarray, codec: PairFeatures, levels: Sequence[Level]) -> np.ndarray:
    """Return what plain rounding with the declared step gives."""
    step = codec.bounds(rows_of(codec, [[values]], levels), levels)[0].item()
    return np.rint((values - values.min()) / np.float32(step))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    step=st.sampled_from([0.05, 0.15, 0.8]),
    kind=st.sampled_from(["silu", "symmetric", "one channel high"]),
)
def test_maps_of_any_size_come_back_within_a_step(seed: int, sizes: list, step: float, kind: str) -> None:
    rng, codec = np.random.default_rng(seed), PairFeatures(step)
    levels = [Level(f"P{number}", size) for number, size in enumerate(sizes)]
    samples = [[_map(kind, level.shape, rng) for level in levels] for _ in range(3)]
    columns = rows_of(codec, samples, levels)
    bounds = codec.bounds(columns, levels)
    for number, (read, bound) in enumerate(zip(codec.decode(columns, levels), bounds, strict=True)):
        truth = np.stack([sample[number] for sample in samples])
        assert read.shape == truth.shape
        assert (np.abs(truth.astype(np.float64) - read.double().numpy()) <= bound.double().numpy()).all()


def _map(kind: str, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    if kind == "silu":
        return silu_map(shape, rng)
    values = rng.standard_normal(shape).astype(np.float32)
    if kind == "one channel high":
        values[0] += 30
    return values


def test_a_peak_comes_back_as_its_own_code_in_its_own_place() -> None:
    level, codec = Level("P3", (20, 8, 8)), PairFeatures(0.15)
    values = silu_map(level.shape, np.random.default_rng(1))
    columns = rows_of(codec, [[values]], [level])
    assert columns["feature_peaks"].shape[1] > 20
    codes = codes_of(values, codec, [level])
    step = codec.bounds(columns, [level])[0].item()
    read = (codec.decode(columns, [level])[0][0].numpy() - values.min()) / step
    assert np.abs(read - codes).max() <= 0.5
    far = codes > 40  # outside every window
    assert far.any() and np.abs(read - codes)[far].max() < 1e-4


def test_channels_have_the_window_that_holds_most_of_their_values() -> None:
    level, codec = Level("P3", (16, 16, 16)), PairFeatures(0.15)
    rng = np.random.default_rng(2)
    values = (rng.uniform(-1, 1, level.shape) + 3 * np.arange(16)[:, None, None]).astype(np.float32)
    # Every channel spans fewer than 15 codes, all of them over 20: with one window for all a third were peaks.
    assert len(codec.encode([values], [level])["feature_peaks"]) == 0


def test_a_level_of_too_many_peaks_gets_a_wider_step_and_says_so() -> None:
    level = Level("P3", (4, 32, 32))
    values = np.random.default_rng(3).uniform(-1, 1, level.shape).astype(np.float32)
    columns = rows_of(PairFeatures(0.02), [[values]], [level])
    step = PairFeatures(0.02).bounds(columns, [level])[0].item()
    assert step > 0.02 * 1.1 * values.std()
    row = PairFeatures(0.02).encode([values], [level])
    assert 0 < len(row["feature_peaks"]) <= level.size // PEAK_SHARE
    error = np.abs(PairFeatures(0.02).decode(columns, [level])[0][0].numpy() - values).max()
    assert 0.4 * step < error <= step


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_neighbour_tells_where_in_its_cell_a_value_lies(side: str) -> None:
    """Values of code 3 lie above their code beside a 6, below beside a 0; each comes back where those like it lie."""
    level, rng = Level("P3", (1, 64, 64)), np.random.default_rng(4)
    other = rng.choice(np.float32([0, 6]), 2048)
    own = 3 + np.where(other == 6, 0.3, -0.3).astype(np.float32)
    pairs = np.stack([own, other] if side == "left" else [other, own], axis=1)
    values = pairs.reshape(level.shape) * np.float32(0.5)
    codec = PairFeatures(0.5 / float(values.std(dtype=np.float64)))
    read = codec.decode(rows_of(codec, [[values]], [level]), [level])[0][0].numpy()
    assert np.abs(read - values).max() < 0.01


def test_the_mean_of_every_channel_comes_back() -> None:
    """Channels that lie on one side of a cell's centroid keep that: an adapter's gradient sums over a channel."""
    level, codec = Level("P3", (48, 32, 32)), PairFeatures(0.8)
    rng = np.random.default_rng(6)
    values = silu_map(level.shape, rng) * rng.uniform(0.05, 1, (48, 1, 1)).astype(np.float32)
    columns = rows_of(codec, [[values]], [level])
    step = codec.bounds(columns, [level])[0].item()
    without = {**columns, "feature_tables": columns["feature_tables"].clone()}
    without["feature_tables"][0, -(48 + 24) : -24] = 0
    read, unshifted = (codec.decode(each, [level])[0][0].numpy() for each in (columns, without))
    off, before = (np.abs((each - values).mean(axis=(1, 2))) / step for each in (read, unshifted))
    assert np.median(off) <= 1 / 254 < 0.01 < np.median(before)
    assert off.max() <= before.max() - 39 / 254  # a shift ends at 40/254


def test_decoding_reads_no_further_than_the_peaks_of_a_row() -> None:
    level, codec = Level("P3", (20, 8, 8)), PairFeatures(0.15)
    samples = [[silu_map(level.shape, np.random.default_rng(seed))] for seed in range(3)]
    columns = rows_of(codec, samples, [level])
    other = {**columns, "feature_peaks": columns["feature_peaks"].clone()}
    for number, maps in enumerate(samples):
        other["feature_peaks"][number, len(codec.encode(maps, [level])["feature_peaks"]) :] = 255
    assert torch.equal(codec.decode(columns, [level])[0], codec.decode(other, [level])[0])


def test_peaks_that_do_not_fit_the_pairs_are_damage() -> None:
    level, codec = Level("P3", (20, 8, 8)), PairFeatures(0.15)
    columns = rows_of(codec, [[silu_map(level.shape, np.random.default_rng(1))]], [level])
    columns["features"] = columns["features"].clone()
    columns["features"][0, 5] = 0xFF
    with pytest.raises(DamagedCacheError, match=r"features of P3: \d+ peaks are marked, \d+ are stored; .*verify"):
        codec.decode(columns, [level])
