"""In: a view's stored row and what the teacher says of it now. Out: the errors, in units of what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cache_kd.codecs import ViewCodec
from cache_kd.codecs.logits import shifted_boxes
from cache_kd.pipeline.identity import recodings
from cache_kd.structures import SampleTargets, ViewSample
from cache_kd.teacher.extract import TeacherModel

RELATIVE_SLACK = 1e-4
"""Room for rounding of the teacher itself, relative to a target's largest value: batch size and threads differ."""
HALF = 2.0**-11
"""Largest relative error of a value in half precision."""
PIXEL_MARGIN = 3.0
"""How much more than the changed pixels that were tried another decoder's may change a target."""


def fidelities(identity: Mapping[str, Any], codec: ViewCodec) -> tuple[str, ...]:
    """Return the fidelities by which a cache's targets were coded one after the other, its own last.

    A recoding that drops stores only codes nothing again.
    """
    chain = [*(str(made["fidelity"]) for made in recodings(identity)), codec.fidelity.name]
    return tuple(dict.fromkeys(chain))


def target_errors(
    codec: ViewCodec,
    row: Mapping[str, np.ndarray],
    live: SampleTargets,
    *,
    coded: Sequence[str],
    room: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return {target: largest error over what is allowed} of one view; above 1 is a fault.

    Allowed is the sum over the codings: the last one's bound, as much for each earlier one, whose steps were finer, but
    half a unit in the last place for `exact`; then `RELATIVE_SLACK`, and `room`.

    Args:
        row: the view's columns. coded: as `fidelities` returns it. room: by target, what other pixels may change.
    """
    batch = codec.decode_one(row)
    rounded = "exact" in coded[:-1]
    steps = len(coded) - rounded
    found: dict[str, float] = {}

    def add(name: str, stored: np.ndarray, true: np.ndarray, bound: Any, largest: float) -> None:
        allowed = bound + (RELATIVE_SLACK + rounded * HALF) * largest + (room or {}).get(name, 0.0)
        found[name] = float((np.abs(stored - true) / allowed).max())

    true = named_targets(codec, live)
    if batch.features is not None:
        tensors = {name: torch.from_numpy(np.array(values))[None] for name, values in row.items()}
        stored = [*batch.features, *batch.layers.values()]
        bounds = [*codec.feature_step(tensors), *codec.layer_step(tensors).values()]
        for level, read, bound in zip((*codec.levels, *codec.layers), stored, bounds, strict=True):
            values = true[name := f"features {level.name}"]
            add(name, read[0].numpy(), values, steps * bound[0].float().numpy(), float(np.abs(values).max()))
    if batch.sent is not None and batch.scores is not None and batch.boxes is not None and batch.sent.any():
        sent = batch.sent[0].numpy()
        for name, read in (("scores", batch.scores), ("boxes", batch.boxes)):
            values = true[name]
            # Sparse rows keep their values to the bit when they are made of sparse rows, so one coding is all.
            add(
                name, read[0].numpy()[sent], values[sent], _logit_bound(codec, name, values[sent]), np.abs(values).max()
            )
    return found


def named_targets(codec: ViewCodec, said: SampleTargets) -> dict[str, np.ndarray]:
    """Return the targets of a view that a cache stores by the names under which errors are told."""
    found: dict[str, np.ndarray] = {}
    if "features" in codec.store:
        levels = zip((*codec.levels, *codec.layers), (*said.features, *said.layers), strict=True)
        found.update({f"features {level.name}": values for level, values in levels})
    if "logits" in codec.store and said.scores is not None and said.boxes is not None:
        found.update(scores=said.scores, boxes=shifted_boxes(said.boxes, codec.head.reg_max))
    return found


def pixel_room(
    codec: ViewCodec, teacher: TeacherModel, views: Sequence[ViewSample], change: np.ndarray, *, batch: int
) -> list[dict[str, float]]:
    """Return by target, for each view, what may change where this machine's decoder gives other pixels.

    Measured: `PIXEL_MARGIN` times the largest change when a view's pixels change as the probe's did, by the negative of
    that, by as much with random signs, and by as much away from middle grey and towards it.

    Args:
        change: (3, H, W), this machine's pixels of the probe minus those that the teacher saw.
    """
    said = [named_targets(codec, one) for one in teacher(list(views), batch=batch)]
    room = [dict.fromkeys(one, 0.0) for one in said]
    for signs in _signs(change, views):
        changed = []
        for view, sign in zip(views, signs, strict=True):
            pixels = (view.pixels.astype(np.int16) + np.abs(change) * sign).clip(0, 255).astype(np.uint8)
            changed.append(replace(view, pixels=pixels))
        for one, before, after in zip(room, said, teacher(changed, batch=batch), strict=True):
            for name, values in named_targets(codec, after).items():
                one[name] = max(one[name], PIXEL_MARGIN * float(np.abs(values - before[name]).max()))
    return room


def _signs(change: np.ndarray, views: Sequence[ViewSample]) -> Iterator[list[np.ndarray]]:
    """Yield for each way in which the pixels are changed the signs, one array a view."""
    rng = np.random.default_rng(0)
    own = np.sign(change)
    yield [own] * len(views)
    yield [-own] * len(views)
    yield [rng.choice(np.array([-1, 1], np.int16), change.shape) for _ in views]
    away = [np.where(view.pixels > 127, 1, -1).astype(np.int16) for view in views]
    yield away
    yield [-signs for signs in away]


def _logit_bound(codec: ViewCodec, name: str, true: np.ndarray) -> Any:
    step = codec.logit_step
    if step is None or (name == "boxes" and codec.head.reg_max == 1):
        return np.abs(true) * 2 * HALF + 1e-4
    return step / 2
