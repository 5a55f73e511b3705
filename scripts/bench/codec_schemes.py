"""In: feature maps. Out: what each way of coding them takes, and what comes back: the package's codecs and the losers.

A scheme codes the maps of one view into byte strings and returns what is read back; `codec_study.py` judges them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numcodecs import blosc

from cache_kd.codecs.features import FeatureCodec, Level, usable_step

blosc.set_nthreads(1)
Maps = Sequence[np.ndarray]
TABLE_BYTES = 264  # lo, step and 256 fractions of a level


@dataclass(frozen=True)
class View:
    """What a scheme may look at: maps (F, H, W) a level, the teacher's largest class probability (H, W) a level."""

    maps: Maps
    scores: Maps
    number: int


@dataclass(frozen=True)
class Coded:
    """What a scheme made of one view: bytes, maps read back, seconds of one core to make and to undo the codes.

    `undone` stops at the codes, as a loader does; `restored` is the way from there to float maps on the same core.
    """

    size: int
    maps: list[np.ndarray]
    made: float
    undone: float
    restored: float


Scheme = Callable[[View], Coded]


def compress(codes: np.ndarray, name: str = "zstd", shuffle: int = 0) -> bytes:
    packed: bytes = blosc.compress(np.ascontiguousarray(codes), name.encode(), 1, shuffle, typesize=1)
    return packed


def _clock() -> float:
    return time.thread_time()


def packaged(codec: FeatureCodec) -> Scheme:
    """One of the package's codecs, its columns under zstd 1 as in a cache, ragged ones at their own length."""

    def code(view: View) -> Coded:
        levels = [Level(f"P{number + 3}", maps.shape) for number, maps in enumerate(view.maps)]  # type: ignore[arg-type]  # (F, H, W)
        typesize = {column.name: column.typesize or 1 for column in codec.columns(levels)}
        begun = _clock()
        rows = codec.encode(view.maps, levels)
        packed = {
            name: blosc.compress(row, b"zstd", 1, int(typesize[name] > 1), typesize=typesize[name])
            for name, row in rows.items()
            if row.size
        }
        made = _clock() - begun
        begun = _clock()
        for data in packed.values():
            blosc.decompress(data)
        undone = _clock() - begun
        columns = {name: torch.from_numpy(row[None]) for name, row in rows.items()}
        begun = _clock()
        decoded = codec.decode(columns, levels)
        restored = _clock() - begun
        maps = [level[0].numpy() for level in decoded]
        return Coded(sum(map(len, packed.values())), maps, made, undone, restored)

    return code


def _centroids(codes: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    counts = np.bincount(codes, minlength=256)
    sums = np.bincount(codes, weights=scaled, minlength=256)
    table: np.ndarray = np.where(counts > 0, sums / np.maximum(counts, 1), np.arange(256)).astype(np.float32)
    return table


def _step(maps: np.ndarray, share: float) -> tuple[float, float]:
    low, high = float(maps.min()), float(maps.max())
    return low, float(usable_step(np.array([max(share * float(maps.std()), (high - low) / 255)]))[0])


def bytes_of_codes(
    share: float,
    *,
    store: Callable[[list[np.ndarray]], tuple[int, float, float]],
    round_codes: Callable[[np.ndarray], np.ndarray] | None = None,
    by_mean: bool = False,
) -> Scheme:
    """One u8 code a value, one step a level, read back at the centroid of each code.

    Args:
        store: codes (F, H, W) of each level -> bytes, seconds to make them and to read them.
        round_codes: scaled values -> codes. by_mean: channels in the order of their mean code.
    """

    def code(view: View) -> Coded:
        begun = _clock()
        codes, steps, extra = [], [], 0
        for maps in view.maps:
            low, step = _step(maps, share)
            scaled = (maps - low) / step
            level = np.rint(scaled).astype(np.uint8) if round_codes is None else round_codes(scaled)
            order = np.argsort(level.reshape(len(maps), -1).sum(1, dtype=np.int64), kind="stable")
            if not by_mean:
                order = np.arange(len(maps))
            extra += TABLE_BYTES + len(maps) // 2 * by_mean
            codes.append(level[order])
            steps.append((low, step, _centroids(level.ravel(), scaled.ravel()), order))
        made = _clock() - begun
        size, packing, undone = store(codes)
        begun = _clock()
        back = []
        for level, (low, step, table, order) in zip(codes, steps, strict=True):
            values = np.empty(level.shape, np.float32)
            values[order] = (table * step + low)[level]
            back.append(values.astype(np.float32))
        return Coded(size + extra, back, made + packing, undone, _clock() - begun)

    return code


def stored_with(name: str, shuffle: int = 0) -> Callable[[list[np.ndarray]], tuple[int, float, float]]:
    """Return a `store` for `bytes_of_codes`: Blosc over the flat row."""

    def store(codes: list[np.ndarray]) -> tuple[int, float, float]:
        begun = _clock()
        data = compress(np.concatenate([level.ravel() for level in codes]), name, shuffle)
        made = _clock() - begun
        begun = _clock()
        blosc.decompress(data)
        return len(data), made, _clock() - begun

    return store


def stored_as_images(codes: list[np.ndarray]) -> tuple[int, float, float]:
    """JPEG-LS, lossless: the channels of a level as one tall image."""
    import imagecodecs

    begun = _clock()
    images = [imagecodecs.jpegls_encode(level.reshape(-1, level.shape[2])) for level in codes]
    made = _clock() - begun
    begun = _clock()
    for data in images:
        imagecodecs.jpegls_decode(data)
    return sum(map(len, images)), made, _clock() - begun


def rate_aware(penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a rounding that takes the nearer or the next code, whichever costs less error + penalty · bits."""

    def rounded(scaled: np.ndarray) -> np.ndarray:
        codes = np.rint(scaled).astype(np.intp)
        below = np.floor(scaled).astype(np.intp)
        part = scaled - below
        for _ in range(2):
            counts = np.bincount(codes.ravel(), minlength=257) + 0.5
            bits = -np.log2(counts / counts.sum())
            up = (1 - part) ** 2 + penalty * bits[below + 1] < part**2 + penalty * bits[below]
            codes = below + up
        return np.minimum(codes, 255).astype(np.uint8)

    return rounded


def dithered(share: float) -> Scheme:
    """Subtractive dither: noise of a step is added before rounding and subtracted after: the error knows no signal."""

    def code(view: View) -> Coded:
        begun = _clock()
        codes, back, restoring = [], [], 0.0
        for number, maps in enumerate(view.maps):
            low, step = _step(maps, share)
            noise = np.random.Generator(np.random.Philox(key=[view.number, number])).random(maps.shape, np.float32)
            level = np.clip(np.floor((maps - low) / step + noise), 0, 255).astype(np.uint8)
            codes.append(level.ravel())
            start = _clock()
            back.append(((level - noise + np.float32(0.5)) * step + low).astype(np.float32))
            restoring += _clock() - start
        data = compress(np.concatenate(codes))
        made = _clock() - begun - restoring
        begun = _clock()
        blosc.decompress(data)
        return Coded(len(data) + 8 * len(codes), back, made, _clock() - begun, restoring)

    return code


def by_score(share: float, finer: float, coarser: float, threshold: float) -> Scheme:
    """Steps that follow the teacher's score map: `finer` × the step where it is above `threshold`, else `coarser` ×."""

    def code(view: View) -> Coded:
        begun = _clock()
        codes, back, restoring, extra = [], [], 0.0, 0
        for maps, scores in zip(view.maps, view.scores, strict=True):
            low, step = _step(maps, share)
            for part, factor in ((scores > threshold, finer), (scores <= threshold, coarser)):
                chosen = maps[:, part]
                own = max(step * factor, float(np.ptp(maps)) / 255)
                level = np.rint((chosen - low) / own).astype(np.uint8)
                codes.append(level.ravel())
                table = _centroids(level.ravel(), ((chosen - low) / own).ravel()) if level.size else np.zeros(256)
                extra += TABLE_BYTES
                start = _clock()
                back.append((part, (table * own + low).astype(np.float32)[level]))
                restoring += _clock() - start
        data = compress(np.concatenate(codes))
        made = _clock() - begun - restoring
        begun = _clock()
        blosc.decompress(data)
        undone = _clock() - begun
        joined = []
        for number, maps in enumerate(view.maps):
            whole = np.empty(maps.shape, np.float32)
            for part, values in back[2 * number : 2 * number + 2]:
                whole[:, part] = values
            joined.append(whole)
        return Coded(len(data) + extra, joined, made, undone, restoring)

    return code


FACTORS = (0.5, 0.71, 1.0, 1.41, 2.0, 2.83)


def per_channel(share: float, weight: str) -> Scheme:
    """A step for each channel, of six around the level's, that gains least error for each bit it costs.

    The slope is that of the middle step at the level's own deviation, so that a uniform step is among the choices.

    Args:
        weight: "level" counts a channel's error by the level's variance, "channel" by its own, as CWD does.
    """

    def code(view: View) -> Coded:
        begun = _clock()
        codes, back = [], []
        for maps in view.maps:
            low, step = _step(maps, share)
            rows = maps.reshape(len(maps), -1)
            costs = np.empty((len(FACTORS), len(rows)))
            tried = []
            importance = 1 / np.maximum(rows.var(axis=1), 1e-6) if weight == "channel" else np.ones(len(rows))
            importance = importance / importance.mean() if weight == "level" else importance * rows.var() / 2
            for number, factor in enumerate(FACTORS):
                own = max(step * factor, float(np.ptp(maps)) / 255)
                level = np.rint((rows - low) / own).astype(np.uint8)
                error = ((rows - level * own - low) ** 2).mean(axis=1)
                bits = np.array([_entropy(channel) for channel in level])
                # dD/dR of a uniform quantiser of step s is -(s² / 6) ln 2
                costs[number] = importance * error + step**2 / 6 * np.log(2) * bits
                tried.append((level, own))
            best = costs.argmin(axis=0)
            level = np.stack([tried[chosen][0][channel] for channel, chosen in enumerate(best)])
            codes.append(level.ravel())
            values = np.empty(rows.shape, np.float32)
            for number in np.unique(best):
                own, mine = tried[number][1], best == number
                table = _centroids(level[mine].ravel(), ((rows[mine] - low) / own).ravel())
                values[mine] = (table * own + low).astype(np.float32)[level[mine]]
            back.append(values.reshape(maps.shape))
        data = compress(np.concatenate(codes))
        made = _clock() - begun
        begun = _clock()
        blosc.decompress(data)
        extra = sum(len(maps) // 2 + TABLE_BYTES for maps in view.maps)
        return Coded(len(data) + extra, back, made, _clock() - begun, 0.0)

    return code


def _entropy(codes: np.ndarray) -> float:
    counts = np.bincount(codes)
    share = counts[counts > 0] / codes.size
    return float(-(share * np.log2(share)).sum())
