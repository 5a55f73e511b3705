"""In: a sample's feature maps. Out: two 4-bit codes a byte, the rare larger ones beside them, tables; and back.

A general compressor codes each byte by how often it occurs. Two neighbours in one byte make it see what they have in
common, and spend less than a bit on a value that is nearly always the same; half as many bytes are decoded. Channels
are grouped by their mean, so that bytes of like statistics lie together, and each group has a window of 15 codes of
its own. Encoding is numpy on one thread and a pure function of the maps; decoding is batched torch on whichever device
the columns lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_kd.codecs.features import CODES, Level, checked_maps, column_of, usable_step, value_range
from cache_kd.errors import DamagedCacheError
from cache_kd.structures import Column

# Fractions of a step are int8 in units of 1/254. Those of a pair and of a channel are held so that half a step of
# rounding and both of them stay below one step, whatever the distribution inside the cell; real maps need less.
FRACTION_UNIT = 254.0
FRACTION_MAX = 86.0
SHIFT_MAX = 40.0
GROUPS = 16
"""Groups of channels of a level."""
PEAK = 15
"""The 4-bit code that says: outside the group's window, see the peaks."""
PAIRS = 256
PEAK_SHARE = 4
"""At most one in this many values of a level is a peak; its step grows until that holds."""
_WIDER = 1.25
_SWAPPED = np.array([(pair & 15) << 4 | pair >> 4 for pair in range(PAIRS)])
_SCALARS = 12  # bytes a level: lo, step, number of peaks


class _Coded(NamedTuple):
    """One level, encoded: pairs (F, ceil(H·W / 2)) u8 in the order of groups, peaks u8, and its part of the tables."""

    pairs: np.ndarray
    peaks: np.ndarray
    low: np.float32
    step: np.float32
    bases: np.ndarray
    fractions: np.ndarray
    shifts: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class _Tables:
    """Of one level and a batch: low, step and peaks (B,), bases (B, 16), groups (B, F); the rest in steps.

    Fractions are (B, 256), shifts (B, F).
    """

    low: Tensor
    step: Tensor
    peaks: Tensor
    bases: Tensor
    fractions: Tensor
    shifts: Tensor
    groups: Tensor


@dataclass(frozen=True)
class PairFeatures:
    """One uniform step an image and level, max(step · sd, range / 255), read back at the mean of what a pair held.

    A value is rounded to lo + code · step, code in 0..255. Channels are split into 16 groups of equal size by their
    mean code; a group's window of 15 codes is the one that holds most of its values. Codes inside are kept as their
    place in the window, others as 15, and in full among the peaks, in the order of the maps. A value inside comes back
    as lo + (code + fraction[own place, neighbour's place] + shift[channel]) · step: fraction is the mean offset of the
    values that had these two places, shift what then brings the mean of the channel back to what it was. Without it
    the errors of a channel add up in the gradient of an adapter. A peak comes back as lo + code · step. Bound: one
    step; the rms error is at most step / √12 where values spread evenly within a cell, as those of real maps do. Peaks
    are never clipped; where they were more than a quarter of a level's values, its step grows, and `bounds` with it.

    Columns: `features` (pairs of a level: (F, ceil(H·W / 2)), channels by group, then by number; the first value of a
    pair in the high half), `feature_peaks` (ragged: codes of all levels), `feature_tables`: raw little-endian bytes:
    float32 lo, float32 step and u32 number of peaks of each level, u8 bases (levels, 16), int8 fractions (levels, 256)
    in units of 1/254 by 16 · own place + neighbour's, then of all channels int8 shifts in the same units and groups,
    two a byte.

    Attributes:
        step: in standard deviations of the level's values.
    """

    step: float
    kind: ClassVar[str] = "pair"

    def columns(self, levels: Sequence[Level]) -> tuple[Column, ...]:
        peaks = sum(_most_peaks(level) for level in levels)
        channels = sum(level.shape[0] for level in levels)
        tables = len(levels) * (_SCALARS + GROUPS + PAIRS) + channels + (channels + 1) // 2
        return (
            Column("features", "u1", (sum(level.shape[0] * _row_bytes(level) for level in levels),)),
            Column("feature_peaks", "u1", (max(1, peaks),), ragged=True),
            Column("feature_tables", "u1", (tables,), whole=True),
        )

    def encode(self, features: Sequence[np.ndarray], levels: Sequence[Level]) -> dict[str, np.ndarray]:
        maps = checked_maps(features, levels)
        coded = [self._encode_level(values, level) for values, level in zip(maps, levels, strict=True)]
        scalars = np.array([[level.low for level in coded], [level.step for level in coded]], "<f4")
        counts = np.array([len(level.peaks) for level in coded], "<u4")
        groups = np.concatenate([level.groups for level in coded])
        tables = [
            scalars.view(np.uint8).ravel(),
            counts.view(np.uint8),
            *(level.bases for level in coded),
            *(level.fractions.view(np.uint8) for level in coded),
            *(level.shifts.view(np.uint8) for level in coded),
            _in_pairs(groups[None])[0],
        ]
        return {
            "features": np.concatenate([level.pairs.ravel() for level in coded]),
            "feature_peaks": np.concatenate([level.peaks for level in coded]),
            "feature_tables": np.concatenate(tables),
        }

    def _encode_level(self, values: np.ndarray, level: Level) -> _Coded:
        low, high = value_range(values, f"features of {level.name}")
        wanted = max(self.step * float(values.std(dtype=np.float64)), (high - low) / (CODES - 1))
        while True:
            step = usable_step(np.array([wanted]))[0]
            scaled = values.reshape(level.shape[0], -1) - np.float32(low)
            scaled /= step
            codes = np.rint(scaled).astype(np.uint8)
            groups = _group(codes)
            order = np.argsort(groups, kind="stable")
            bases = _windows(codes[order], groups[order])
            places = codes - bases[groups][:, None]  # wraps below 0 to far above the window
            peaks = codes[places >= PEAK]
            if len(peaks) <= _most_peaks(level):
                break
            wanted *= _WIDER
        np.minimum(places, PEAK, out=places)
        scaled -= codes
        pairs = _in_pairs(places)
        fractions, shifts = _corrections(places, pairs, scaled)
        return _Coded(pairs[order], peaks, np.float32(low), step, bases, fractions, shifts, groups)

    def _tables(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> list[_Tables]:
        tables, count = column_of(columns, "feature_tables"), len(levels)
        # a copy of its own starts at offset 0, which a view of another element size needs
        channels = [level.shape[0] for level in levels]
        sizes = [_SCALARS * count, GROUPS * count, PAIRS * count, sum(channels)]
        scalars, bases, fractions, shifts, packed = torch.split(tables, [*sizes, tables.shape[1] - sum(sizes)], dim=1)
        scalars = scalars.clone(memory_format=torch.contiguous_format)
        floats, counts = scalars.view(torch.float32), scalars.view(torch.int32)
        in_steps, shifts = (
            table.contiguous().view(torch.int8).float() / FRACTION_UNIT for table in (fractions, shifts)
        )
        groups = torch.stack([packed >> 4, packed & 15], dim=2).flatten(1)
        of_level = torch.split(groups[:, : sum(channels)], channels, dim=1)
        shifts_of_level = torch.split(shifts, channels, dim=1)
        return [
            _Tables(
                floats[:, number],
                floats[:, count + number],
                counts[:, 2 * count + number],
                bases[:, number * GROUPS : (number + 1) * GROUPS].float(),
                in_steps[:, number * PAIRS : (number + 1) * PAIRS],
                shifts_of_level[number],
                of_level[number].long(),
            )
            for number in range(count)
        ]

    def decode(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> tuple[Tensor, ...]:
        rows = torch.split(
            column_of(columns, "features"), [level.shape[0] * _row_bytes(level) for level in levels], dim=1
        )
        peaks = column_of(columns, "feature_peaks")
        tables = self._tables(columns, levels)
        # One wait for the device a batch, before anything of the step has been sent to it.
        counts = torch.stack([table.peaks for table in tables], dim=1).tolist()
        starts = [0] * len(peaks)
        decoded = []
        for number, (pairs, table, level) in enumerate(zip(rows, tables, levels, strict=True)):
            ends = [start + count[number] for start, count in zip(starts, counts, strict=True)]
            codes = torch.cat([row[start:end] for row, start, end in zip(peaks, starts, ends, strict=True)])
            decoded.append(_decoded_level(pairs, table, level, codes))
            starts = ends
        return tuple(decoded)

    def bounds(self, columns: Mapping[str, Tensor], levels: Sequence[Level]) -> list[Tensor]:
        return [table.step[:, None, None, None] for table in self._tables(columns, levels)]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step}


def _row_bytes(level: Level) -> int:
    """Return the bytes of a channel's pairs."""
    return -(-level.shape[1] * level.shape[2] // 2)


def _most_peaks(level: Level) -> int:
    return level.size // PEAK_SHARE


def _group(codes: np.ndarray) -> np.ndarray:
    """Return the group 0..15 of each channel of codes (F, n): equal shares in the order of the mean code."""
    order = np.argsort(codes.sum(axis=1, dtype=np.int64), kind="stable")
    groups = np.empty(len(codes), np.uint8)
    groups[order] = np.arange(len(codes)) * GROUPS // len(codes)
    return groups


def _windows(codes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return for each group the first code, u8, of the window of 15 that holds most of its values.

    Args:
        codes: (F, n), channels by group. groups: (F,), ascending.
    """
    bases = np.zeros(GROUPS, np.uint8)
    edges = np.searchsorted(groups, np.arange(GROUPS + 1))
    for group in range(GROUPS):
        counts = np.bincount(codes[edges[group] : edges[group + 1]].ravel(), minlength=CODES)
        sums = np.concatenate([[0], np.cumsum(counts)])
        bases[group] = np.argmax(sums[PEAK:] - sums[:-PEAK])
    return bases


def _in_pairs(places: np.ndarray) -> np.ndarray:
    """Return rows (F, n) of 4-bit numbers as (F, ceil(n / 2)) bytes; an odd row ends with a 0."""
    left, right = places[:, 0::2], places[:, 1::2]
    pairs = left << 4
    pairs[:, : right.shape[1]] |= right
    return pairs


def _corrections(places: np.ndarray, pairs: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return fractions int8 (256,) and shifts int8 (F,), see `PairFeatures`.

    Args:
        places: (F, n). pairs: (F, ceil(n / 2)). offsets: (F, n) from the codes, in steps.
    """
    whole = offsets.shape[1] // 2
    first = pairs.astype(np.intp)
    second = _SWAPPED[first[:, :whole]]
    counts = np.bincount(first.ravel(), minlength=PAIRS) + np.bincount(second.ravel(), minlength=PAIRS)
    sums = np.bincount(first.ravel(), weights=offsets[:, 0::2].ravel(), minlength=PAIRS)
    sums += np.bincount(second.ravel(), weights=offsets[:, 1::2].ravel(), minlength=PAIRS)
    means = sums / np.maximum(counts, 1) * FRACTION_UNIT
    means[PEAK << 4 :] = 0  # a peak's own code is exact
    fractions = np.asarray(np.rint(means).clip(-FRACTION_MAX, FRACTION_MAX), np.int8)
    explained = fractions[first].sum(axis=1, dtype=np.int64) + fractions[second].sum(axis=1, dtype=np.int64)
    inside = np.maximum(np.count_nonzero(places < PEAK, axis=1), 1)
    missing = (offsets.sum(axis=1, dtype=np.float64) * FRACTION_UNIT - explained) / inside
    return fractions, np.asarray(np.rint(missing).clip(-SHIFT_MAX, SHIFT_MAX), np.int8)


def _decoded_level(pairs: Tensor, table: _Tables, level: Level, peaks: Tensor) -> Tensor:
    """Return a level's values (B, F, H, W); `peaks` are the codes of those of the batch, in order."""
    batch, channels = table.groups.shape
    order = torch.argsort(table.groups, dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(channels, device=order.device).expand_as(order))
    first = torch.arange(batch, device=order.device)[:, None]
    rows = pairs.reshape(batch * channels, -1).index_select(0, (place + first * channels).flatten())
    # One flat table by (image, group, byte), a pair of float32 moved as one number of 64 bits, int32 indices: a third
    # of the time that rows of two and int64 indices take.
    base = ((first * GROUPS + table.groups) * PAIRS).int().flatten()
    both = _lookup(table).view(torch.int64).flatten()
    values = both.index_select(0, (rows + base[:, None]).flatten()).view(torch.float32)
    values.view(batch, channels, -1).add_((table.shifts * table.step[:, None])[:, :, None])
    missing = _peak_places(rows.flatten())
    if len(missing) != len(peaks):
        raise DamagedCacheError(
            f"features of {level.name}: {len(missing)} peaks are marked, {len(peaks)} are stored; run cache-kd verify"
        )
    of_peaks = [torch.repeat_interleave(scalar, table.peaks) for scalar in (table.low, table.step)]
    values.scatter_(0, missing, of_peaks[0] + peaks.float() * of_peaks[1])
    cells = level.shape[1] * level.shape[2]
    return values.view(batch, channels, -1)[:, :, :cells].reshape(batch, *level.shape)


def _peak_places(pairs: Tensor) -> Tensor:
    """Return where in the values of `pairs` (n,), two each, peaks belong; bytes are fewer to search than values."""
    # bits 0 and 4: all four bits of that half are set; a quarter of the time of two comparisons
    marked = pairs & (pairs >> 1) & (pairs >> 2) & (pairs >> 3) & 0b10001
    found = marked.nonzero().squeeze(1)
    byte = pairs.index_select(0, found)
    is_peak = torch.stack([byte >> 4, byte & PEAK], dim=1) == PEAK
    return torch.stack([2 * found, 2 * found + 1], dim=1).masked_select(is_peak)


def _lookup(table: _Tables) -> Tensor:
    """Return (B, 16, 256, 2): the two values that a byte stands for in each group."""
    byte = torch.arange(PAIRS, device=table.low.device)
    own = torch.stack([byte >> 4, byte & 15], dim=1)  # (256, 2)
    swapped = own * 16 + own.flip(1)
    places = own.float() + table.fractions[:, swapped]  # (B, 256, 2)
    codes = places[:, None] + table.bases[:, :, None, None]
    return codes.mul_(table.step[:, None, None, None]).add_(table.low[:, None, None, None])
