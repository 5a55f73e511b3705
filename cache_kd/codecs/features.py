"""In: a sample's feature maps. Out: a flat u8 row and its tables, with a declared error bound; and back, in batches.

A row holds the levels in order, each in (F, H, W) order. Encoding is numpy on one thread and a pure function of the
maps; decoding is batched torch on whichever device the columns lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from cache_kd.errors import AlarmError, MismatchError
from cache_kd.structures import Column

HALF_MAX = 65504.0
VALUE_MAX = 1e30
CODES = 256
# A constant map has no deviation; its codes are all 0 and any step will do.
SMALLEST_STEP = 2.0**-100


@dataclass(frozen=True)
class Level:
    """Name and (F, H, W) of a feature level."""

    name: str
    shape: tuple[int, int, int]

    @property
    def size(self) -> int:
        channels, height, width = self.shape
        return channels * height * width


class FeatureCodec(Protocol):
    """Feature maps ↔ columns `features` and, for quantisers, `feature_tables`."""

    kind: ClassVar[str]

    def columns(self, levels: Sequence[Level]) -> tuple[Column, ...]: ...

    def encode(self, features: Sequence[np.ndarray], levels: Sequence[Level]) -> dict[str, np.ndarray]: ...

    def decode(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> tuple[Tensor, ...]: ...

    def bounds(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> list[Tensor]:
        """Return per level the largest |error| a value may have, broadcastable against (B, F, H, W)."""
        ...

    def describe(self) -> dict[str, Any]: ...


CHECK_TEACHER = "check the teacher: yolo val model=TEACHER data=DATA; if it ran in fp16, extract with --precision fp32"


def value_range(
    values: np.ndarray, where: str, limit: float = VALUE_MAX, *, cure: str = CHECK_TEACHER
) -> tuple[float, float]:
    """Return the smallest and largest value.

    Args:
        where: what the values are, for the message.
        limit: largest magnitude that can be stored.
        cure: what to do about values beyond the limit.

    Raises:
        AlarmError: a value is NaN, infinite or beyond the limit.
    """
    low, high = float(values.min()), float(values.max())
    if -limit <= low and high <= limit:
        return low, high
    unusable = int(np.count_nonzero(~np.isfinite(values)))
    if unusable:
        raise AlarmError(f"{where}: {unusable} of {values.size} values are not finite; {CHECK_TEACHER}")
    beyond = int(np.count_nonzero(np.abs(values) > limit))
    raise AlarmError(f"{where}: {beyond} of {values.size} values are beyond ±{limit:g}; {cure}")


def checked_maps(features: Sequence[np.ndarray], levels: Sequence[Level]) -> list[np.ndarray]:
    """Return the maps as flat C-order float32; raises `MismatchError` unless their shapes are those of the levels."""
    got, expected = [tuple(map.shape) for map in features], [level.shape for level in levels]
    if got != expected:
        names = ", ".join(level.name for level in levels)
        raise MismatchError(
            f"features {names} have shapes {got}, the cache holds {expected}; "
            "extract with the teacher and the image size of this cache: cache-kd inspect CACHE"
        )
    return [np.ascontiguousarray(map, dtype=np.float32).reshape(-1) for map in features]


def level_rows(row: Tensor, levels: Sequence[Level]) -> list[Tensor]:
    """Split rows (B, V) into one (B, F·H·W) slice a level."""
    return list(torch.split(row, [level.size for level in levels], dim=1))


def column_of(columns: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a column; raises `MismatchError` when it was not read."""
    if name not in columns:
        raise MismatchError(f"column {name!r} was not read; read all of ViewCodec.columns_for(needs) together")
    return columns[name]


def usable_step(step: np.ndarray) -> np.ndarray:
    """Return steps above 0 as float32, rounded up to 11 explicit mantissa bits.

    So code · step is exact, and the order in which a standard deviation was summed hardly ever shows in the bytes.
    Offsets far larger than the step need no care: lo, the values and what is read back lie on one grid of float32, and
    rounding to it cannot leave the range of the values of a cell.
    """
    positive = np.maximum(step, SMALLEST_STEP).astype("<f4")
    rounded: np.ndarray = ((positive.view("<u4") + np.uint32(0xFFF)) & np.uint32(0xFFFFF000)).view("<f4")
    return rounded


@dataclass(frozen=True)
class HalfFeatures:
    """Half precision, bit for bit; bound: half a unit in the last place of the level's largest value."""

    kind: ClassVar[str] = "half"

    def columns(self, levels: Sequence[Level]) -> tuple[Column, ...]:
        return (Column("features", "u1", (2 * sum(level.size for level in levels),), typesize=2),)

    def encode(self, features: Sequence[np.ndarray], levels: Sequence[Level]) -> dict[str, np.ndarray]:
        maps = checked_maps(features, levels)
        for values, level in zip(maps, levels, strict=True):
            cure = "store them quantised: cache-kd extract ... --fidelity safe"
            value_range(values, f"features of {level.name}", HALF_MAX, cure=cure)
        return {"features": np.concatenate([values.astype("<f2") for values in maps]).view(np.uint8)}

    def decode(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> tuple[Tensor, ...]:
        row = column_of(columns, "features").contiguous().view(torch.float16)
        return tuple(
            values.float().view(-1, *level.shape) for values, level in zip(level_rows(row, levels), levels, strict=True)
        )

    def bounds(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> list[Tensor]:
        return [
            (features.abs().amax(dim=(1, 2, 3), keepdim=True) * 2.0**-11).clamp_min(2.0**-25)
            for features in self.decode(columns, levels)
        ]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind}


@dataclass(frozen=True)
class ChannelFeatures:
    """u8 per image and channel: lo + code · step with step = range / 255; bound: one step (half a step in practice).

    Tables are float32 (2, channels of all levels): lo, step.
    """

    kind: ClassVar[str] = "channel"

    def columns(self, levels: Sequence[Level]) -> tuple[Column, ...]:
        channels = sum(level.shape[0] for level in levels)
        return (
            Column("features", "u1", (sum(level.size for level in levels),)),
            Column("feature_tables", "f4", (2, channels), whole=True),
        )

    def encode(self, features: Sequence[np.ndarray], levels: Sequence[Level]) -> dict[str, np.ndarray]:
        codes, tables = [], []
        for values, level in zip(checked_maps(features, levels), levels, strict=True):
            value_range(values, f"features of {level.name}")
            rows = values.reshape(level.shape[0], -1)
            low, high = rows.min(axis=1), rows.max(axis=1)
            step = usable_step((high.astype(np.float64) - low) / (CODES - 1))
            scaled = (rows - low[:, None]) / step[:, None]
            codes.append(np.rint(scaled, out=scaled).astype(np.uint8).reshape(-1))
            tables.append(np.stack([low, step]))
        return {"features": np.concatenate(codes), "feature_tables": np.concatenate(tables, axis=1).astype("<f4")}

    def decode(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> tuple[Tensor, ...]:
        tables = torch.split(column_of(columns, "feature_tables"), [level.shape[0] for level in levels], dim=2)
        decoded = []
        rows = level_rows(column_of(columns, "features"), levels)
        for codes, table, level in zip(rows, tables, levels, strict=True):
            low, step = table[:, 0, :, None, None], table[:, 1, :, None, None]
            decoded.append(codes.reshape(-1, *level.shape).float().mul_(step).add_(low))
        return tuple(decoded)

    def bounds(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> list[Tensor]:
        tables = torch.split(column_of(columns, "feature_tables"), [level.shape[0] for level in levels], dim=2)
        return [table[:, 1, :, None, None] for table in tables]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind}
