"""Heads, presets and samples like those of trained networks, for the tests of codecs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cache_kd.codecs import FIDELITIES, ViewCodec
from cache_kd.structures import HeadSpec, SampleTargets, Tap

IMGSZ = 64
TAPS = (Tap("P3", 8, 8), Tap("P4", 16, 16), Tap("P5", 12, 32))
HEADS = {
    "dfl-80": HeadSpec(TAPS, 16, tuple(f"class {number}" for number in range(80)), hold=(8, 8, 8)),
    "dfl-1": HeadSpec(TAPS, 16, ("cell",), hold=(2, 2, 2)),
    "end2end-3": HeadSpec(TAPS, 1, ("a", "b", "c"), end2end=True, layers=(Tap("C4", 10, 16), Tap("6.cv1", 5, 8))),
}
BOTH = ("features", "logits")
MAPS = ("silu", "outlier", "constant", "zero", "offset", "two values", "subnormal")
THRESHOLDS = {"safe": 0.003, "default": 0.01, "small": 0.01, "tiny": 0.05}
STEPS = {"default": 0.15, "small": 0.3, "tiny": 0.8}

presets = pytest.mark.parametrize("preset", FIDELITIES)
coded_presets = pytest.mark.parametrize("preset", [name for name in FIDELITIES if name != "exact"])
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def silu_map(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return a map like those of a trained network: most values near -0.278, rare peaks of twenty deviations."""
    raw = rng.standard_normal(shape) * 1.1 - 1.2 + rng.standard_exponential(shape) * (rng.random(shape) < 0.1)
    return (raw / (1 + np.exp(-raw))).astype(np.float32)


def any_map(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = silu_map(shape, rng)
    if kind == "outlier":
        values.reshape(-1)[rng.integers(values.size)] = 500
    elif kind in ("constant", "zero"):
        values[:] = rng.normal() if kind == "constant" else 0
    elif kind == "offset":
        values = 1000 + values * np.float32(10 ** -rng.uniform(1, 5))
    elif kind == "two values":
        values = rng.choice(np.float32([-0.278, 3]), shape)
    elif kind == "subnormal":
        values *= np.float32(1e-41)
    return values


def make_sample(head: HeadSpec, seed: int, kind: str = "silu", *, boxes_in_image: bool = True) -> SampleTargets:
    rng = np.random.default_rng(seed)
    anchors = head.num_anchors(IMGSZ)
    confident = rng.random((anchors, 1)) < 0.2
    scores = (rng.normal(-13, 2, (anchors, head.num_classes)) + 10 * confident).astype(np.float32)
    boxes = rng.normal(0, 6, (anchors, 4 * head.reg_max)).astype(np.float32)
    hold = rng.normal(0, 1, (2, head.hold_channels)).astype(np.float32)
    layers = [(tap.channels, IMGSZ // tap.stride, IMGSZ // tap.stride) for tap in head.layers]
    return SampleTargets(
        features=tuple(any_map(kind, shape, rng) for shape in head.feature_shapes(IMGSZ)),
        layers=tuple(any_map(kind, shape, rng) for shape in layers),
        scores=scores,
        boxes=boxes,
        score_map=(1 / (1 + np.exp(-scores.max(axis=1).astype(np.float64)))).astype(np.float32),
        hold_mean=hold[0],
        hold_m2=hold[1] ** 2,
        in_box=rng.random(anchors) < (0.1 if boxes_in_image else 0),
    )


def rows_of(codec: ViewCodec, samples: Sequence[SampleTargets]) -> dict[str, torch.Tensor]:
    """Return a batch of columns as a reader hands it over; ragged rows are padded with bytes that mean nothing."""
    rows = [codec.encode(sample) for sample in samples]
    batch = {}
    for column in codec.columns:
        values = [row[column.name] for row in rows]
        if column.ragged:
            longest = max(map(len, values)) + 1
            padded = [np.pad(value, (0, longest - len(value)), constant_values=255) for value in values]
            batch[f"{column.name}_length"] = torch.tensor([len(value) for value in values])
            values = padded
        batch[column.name] = torch.from_numpy(np.stack(values))
    return batch
