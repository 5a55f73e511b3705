"""In: a sample's score map and hold statistics. Out: their columns, rounded so that they compress; and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_kd.errors import AlarmError
from cache_kd.structures import Column

CODE_MAX = 127
MANTISSA_BITS = 23


@dataclass(frozen=True)
class ScoreMap:
    """Largest class probability of each anchor.

    Attributes:
        step: of the int8 codes of the logit, which span ±127 steps; bound: half a step in the logit inside that span.
            None stores the probability in half precision.
    """

    step: float | None

    def column(self, anchors: int) -> Column:
        return Column("score_map", "f2" if self.step is None else "i1", (anchors,))

    def encode(self, score_map: np.ndarray) -> np.ndarray:
        """Return the row; raises `AlarmError` for a value outside 0..1 or NaN."""
        if not (score_map.min() >= 0 and score_map.max() <= 1):
            wrong = int(np.count_nonzero(~((score_map >= 0) & (score_map <= 1))))
            raise AlarmError(
                f"score map: {wrong} of {score_map.size} values are no probability (0..1); "
                "check the teacher; if it ran in fp16, extract again in fp32"
            )
        if self.step is None:
            return score_map.astype("<f2")
        probability = score_map.astype(np.float64)
        with np.errstate(divide="ignore"):
            logit = np.log(probability) - np.log1p(-probability)
        return np.rint(logit / self.step).clip(-CODE_MAX, CODE_MAX).astype(np.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return (B, A) probabilities, float32."""
        if self.step is None:
            return codes.float()
        # through a table, since a vectorised sigmoid may differ in the last bit with the place of a value in the batch
        span = torch.arange(-CODE_MAX, CODE_MAX + 1, device=codes.device)
        table = torch.sigmoid(span * self.step)
        return table.index_select(0, codes.flatten().int() + CODE_MAX).view(codes.shape)

    def describe(self) -> dict[str, Any]:
        return {"step": self.step}


@dataclass(frozen=True)
class HoldStats:
    """Mean and sum of squared deviations of the head's hold features, float32.

    Attributes:
        mantissa_bits: explicit bits kept, rounded to nearest; bound: 2^-(bits + 1) of the value. 23 keeps all.
    """

    mantissa_bits: int

    def column(self, channels: int) -> Column:
        return Column("hold_stats", "f4", (2, channels))

    def encode(self, mean: np.ndarray, m2: np.ndarray) -> np.ndarray:
        """Return the row (2, channels); raises `AlarmError` for NaN and infinities."""
        stats = np.stack([mean, m2]).astype("<f4")
        rounded = round_mantissa(stats, self.mantissa_bits)
        if not np.isfinite(rounded).all():
            wrong = int(np.count_nonzero(~np.isfinite(rounded)))
            raise AlarmError(
                f"hold statistics: {wrong} of {rounded.size} values are not finite; "
                "check the teacher; if it ran in fp16, extract again in fp32"
            )
        return rounded

    def describe(self) -> dict[str, Any]:
        return {"mantissa_bits": self.mantissa_bits}


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """Return float32 values with all but the first `bits` explicit mantissa bits rounded away, ties to even."""
    drop = MANTISSA_BITS - bits
    if drop == 0:
        return values
    raw = values.view("<u4")
    half = np.uint32((1 << (drop - 1)) - 1)
    kept = (raw + half + ((raw >> np.uint32(drop)) & np.uint32(1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    rounded: np.ndarray = np.where(np.isfinite(values), kept.view("<f4"), values)
    return rounded
