"""In: a sample's targets. Out: the named columns of a view's row; and back, a batch of targets for the losses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_kd.codecs.features import Level
from cache_kd.codecs.fidelity import Fidelity
from cache_kd.codecs.fidelity import fidelity as preset
from cache_kd.codecs.logits import LogitShape
from cache_kd.errors import MismatchError, SettingError, choices
from cache_kd.structures import STORES, Column, HeadSpec, SampleTargets, TargetBatch

STORE_OF_NEED = {"features": "features", "score_map": "features", "logits": "logits", "hold_stats": "logits"}


@dataclass(frozen=True)
class ViewCodec:
    """The codec of a cache: which columns its views have, how targets become rows and rows targets.

    Attributes:
        fidelity: parameters of every codec. store: which tiers are kept, of "features" and "logits".
    """

    fidelity: Fidelity
    head: HeadSpec
    imgsz: int
    store: tuple[str, ...]

    @classmethod
    def create(cls, fidelity: str, head: HeadSpec, imgsz: int, store: Collection[str]) -> ViewCodec:
        """Return the codec of a preset; raises `SettingError` for an unknown preset or store."""
        for name in store:
            if name not in STORES:
                raise SettingError(f"--store {name!r} is unknown; {choices(name, STORES)}")
        if not store:
            raise SettingError(f"--store is empty; {choices('', STORES)}")
        return cls(preset(fidelity), head, imgsz, tuple(name for name in STORES if name in store))

    def describe(self) -> dict[str, Any]:
        """Return what the manifest records, enough for `from_description`."""
        return {**self.fidelity.describe(), "store": list(self.store)}

    @classmethod
    def from_description(cls, data: Mapping[str, Any], head: HeadSpec, imgsz: int) -> ViewCodec:
        return cls(Fidelity.from_description(data), head, imgsz, tuple(str(name) for name in data["store"]))

    @property
    def levels(self) -> tuple[Level, ...]:
        shapes = self.head.feature_shapes(self.imgsz)
        return tuple(Level(tap.name, shape) for tap, shape in zip(self.head.taps, shapes, strict=True))

    @property
    def logit_shape(self) -> LogitShape:
        return LogitShape(self.head.num_anchors(self.imgsz), self.head.num_classes, self.head.reg_max)

    @property
    def logit_step(self) -> float | None:
        """Step of the logit codes, whose half bounds the error of sent anchors; None for half precision."""
        return self.fidelity.logits.step

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(column for columns in self._columns_of_need().values() for column in columns)

    def _columns_of_need(self) -> dict[str, tuple[Column, ...]]:
        shape = self.logit_shape
        found: dict[str, tuple[Column, ...]] = {}
        if "features" in self.store:
            found["features"] = self.fidelity.features.columns(self.levels)
            found["score_map"] = (self.fidelity.score_map.column(shape.anchors),)
        if "logits" in self.store:
            found["logits"] = self.fidelity.logits.columns(shape)
            if self.head.hold_channels:
                found["hold_stats"] = (self.fidelity.hold_stats.column(self.head.hold_channels),)
        return found

    def columns_for(self, needs: Collection[str], *, needed_by: str = "what reads them") -> tuple[str, ...]:
        """Return the names of the columns to read, in the cache's order.

        Args:
            needs: of "features", "score_map", "logits" and "hold_stats". needed_by: the reader's name in an error.

        Raises:
            MismatchError: the cache was extracted without what is needed.
        """
        found = self._columns_of_need()
        for need in needs:
            if need not in STORE_OF_NEED:
                raise MismatchError(f"no target is called {need!r}; {choices(need, STORE_OF_NEED)}")
            if need in found:
                continue
            if STORE_OF_NEED[need] in self.store:
                raise MismatchError(
                    f"{needed_by} needs hold_stats and the teacher's head has no hold features; "
                    "choose other losses: cache-kd losses"
                )
            raise MismatchError(
                f"{needed_by} needs {need} and the cache was extracted with --store {','.join(self.store)}; "
                f"extract again: cache-kd extract ... --store {','.join(STORES)}"
            )
        return tuple(column.name for need, columns in found.items() if need in needs for column in columns)

    def encode(self, sample: SampleTargets) -> dict[str, np.ndarray]:
        """Return the row of every column; a ragged one as flat u8 of its own length.

        Raises:
            MismatchError: a target that this cache stores is missing or has another shape.
            AlarmError: a value is not finite or beyond what can be stored.
        """
        row: dict[str, np.ndarray] = {}
        if "features" in self.store:
            row.update(self.fidelity.features.encode(sample.features, self.levels))
            score_map = _present(sample.score_map, "score_map", (self.logit_shape.anchors,))
            row["score_map"] = self.fidelity.score_map.encode(score_map)
        if "logits" in self.store:
            row.update(self._encode_logits(sample))
        return row

    def _encode_logits(self, sample: SampleTargets) -> dict[str, np.ndarray]:
        shape = self.logit_shape
        scores = _present(sample.scores, "scores", (shape.anchors, shape.classes))
        boxes = _present(sample.boxes, "boxes", (shape.anchors, shape.box_width))
        row = self.fidelity.logits.encode(scores, boxes, sample.in_box, shape)
        if self.head.hold_channels:
            channels = (self.head.hold_channels,)
            mean = _present(sample.hold_mean, "hold_mean", channels)
            row["hold_stats"] = self.fidelity.hold_stats.encode(mean, _present(sample.hold_m2, "hold_m2", channels))
        return row

    def decode(self, columns: Mapping[str, Tensor]) -> TargetBatch:
        """Return the targets of a batch on the device of its columns.

        Args:
            columns: any of this codec's columns, each (B, ...); a ragged one as (B, L) u8 padded with anything, beside
                it `<name>_length` (B,), which is checked when given.

        Raises:
            MismatchError: a column came without the one that it is decoded with.
            DamagedCacheError: a ragged row does not fit its own header.
        """
        targets: dict[str, Any] = {}
        if "features" in columns:
            targets["features"] = self.fidelity.features.decode(columns, self.levels)
        if "score_map" in columns:
            targets["score_map"] = self.fidelity.score_map.decode(columns["score_map"])
        if any(column.name in columns for column in self.fidelity.logits.columns(self.logit_shape)):
            logits = self.fidelity.logits.decode(columns, self.logit_shape)
            targets.update(scores=logits.scores, boxes=logits.boxes, sent=logits.sent)
        if "hold_stats" in columns:
            targets["hold_mean"], targets["hold_m2"] = columns["hold_stats"].unbind(dim=1)
        return TargetBatch(**targets)

    def decode_one(self, columns: Mapping[str, np.ndarray]) -> TargetBatch:
        """Return one sample's targets as a batch of 1, from rows as `encode` returns them or as they are read."""
        return self.decode({name: torch.from_numpy(np.array(row)[None]) for name, row in columns.items()})

    def feature_step(self, columns: Mapping[str, Tensor]) -> list[Tensor]:
        """Return per level the largest |error| that a value may have, broadcastable against (B, F, H, W)."""
        return self.fidelity.features.bounds(columns, self.levels)


def _present(values: np.ndarray | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 values; raises `MismatchError` when they are missing or have another shape."""
    if values is None or values.shape != shape:
        got = "nothing" if values is None else f"shape {values.shape}"
        raise MismatchError(
            f"targets of a sample: {name} must have shape {shape}, got {got}; "
            "compare the teacher with the cache: cache-kd inspect CACHE"
        )
    return values.astype(np.float32, copy=False)
