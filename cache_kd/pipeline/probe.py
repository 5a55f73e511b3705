"""In: a data set, a teacher, codecs. Out: bytes and seconds of an item, measured on a sample; nothing is written."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from cache_kd.cache.units import measure_rows
from cache_kd.codecs import ViewCodec
from cache_kd.errors import AlarmError
from cache_kd.pipeline.contents import stored_columns
from cache_kd.structures import KINDS, PIXEL_HASH, SampleTargets, View, ViewSample
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.teacher import Teacher

ITEMS = 24
"""Items of each kind of view that an estimate looks at first."""
MOST_ITEMS = 192
PROBE_ITEMS = 16
"""Items of each kind of view that are looked at before an extraction."""
TOLERANCE = 0.02
"""Standard error of the mean bytes, relative, above which more items are looked at."""

Sizes = dict[str, np.ndarray]


@dataclass(frozen=True)
class ItemSeconds:
    """Mean seconds of an item: making the view, all of the teacher, of that its forward pass, coding and compressing.

    Attributes:
        encode: by fidelity. decode: of one image file, which the data set keeps while there is room; not in `views`.
        images: how many image files a view is made of.
    """

    views: float
    decode: float
    images: float
    teacher: float
    forward: float
    encode: Mapping[str, float]


@dataclass(frozen=True)
class Probed:
    """What the items of a sample took.

    Attributes:
        sizes: bytes of each item by fidelity, kind of view and array. seconds: of an item. batch: views a pass.
        images_kept: the decoded images of the whole data set fit in the memory that is set aside for them.
        samples: the last batch, pixels and boxes.
    """

    sizes: Mapping[str, Mapping[str, Sizes]]
    seconds: ItemSeconds
    batch: int
    images_kept: bool
    samples: Sequence[ViewSample]

    @property
    def items(self) -> int:
        return sum(len(arrays[PIXEL_HASH.name]) for arrays in next(iter(self.sizes.values())).values())

    def item_bytes(self, fidelity: str, kind: str, arrays: Sequence[str] | None = None) -> float:
        """Return the mean bytes of an item, of all arrays or of some; a kind that was not probed is like the other."""
        kinds = self.sizes[fidelity]
        found = kinds.get(kind) or next(iter(kinds.values()))
        return float(sum(found[name].mean() for name in (arrays if arrays is not None else found)))

    def error(self, fidelity: str) -> float:
        """Return the standard error of the mean bytes of an item, relative, of the kind that varies most."""
        return max(_error(arrays) for arrays in self.sizes[fidelity].values())


@dataclass
class _Tally:
    """Sums over the batches of a probe."""

    rows: dict[str, dict[str, dict[str, list[np.ndarray]]]] = field(default_factory=dict)
    encode: dict[str, float] = field(default_factory=dict)
    views: float = 0.0
    teacher: float = 0.0
    forward: float = 0.0
    items: int = 0
    batches: int = 0
    samples: list[ViewSample] = field(default_factory=list)
    decode: float = 0.0
    decoded: int = 0
    made_of: list[float] = field(default_factory=list)


def probe(
    dataset: ViewDataset,
    teacher: Teacher,
    codecs: Mapping[str, ViewCodec],
    views: Sequence[View],
    *,
    batch: int,
    items: int = ITEMS,
    most: int = MOST_ITEMS,
) -> Probed:
    """Run a sample of the items of `views` through teacher and codecs.

    Args:
        codecs: By fidelity; the same teacher's outputs go through each.
        batch: Views a forward pass.
        items: Of each kind of view; more, up to `most`, while their bytes scatter by over `TOLERANCE`.

    Raises:
        AlarmError: The teacher says something that cannot be stored.
    """
    tally = _Tally()
    sizes: dict[str, dict[str, Sizes]] = {name: {} for name in codecs}
    for kind in KINDS:
        order = sample_order([view for view in views if view.kind == kind], len(dataset))
        wanted, done = items, 0
        while done < min(wanted, len(order)):
            part = order[done : done + batch]
            _one_batch(dataset, teacher, codecs, part, batch, tally)
            done += len(part)
            if done >= min(wanted, len(order)):
                _measure(kind, codecs, dataset, tally, sizes)
                if done < len(order) and max(_error(one[kind]) for one in sizes.values()) > TOLERANCE:
                    wanted = min(most, wanted * 2)
    kept = _images_kept(dataset)
    count = tally.items
    seconds = ItemSeconds(
        views=tally.views / count,
        decode=tally.decode / max(1, tally.decoded),
        images=max([1.0, *tally.made_of]),
        teacher=tally.teacher / tally.batches / batch,
        forward=tally.forward / tally.batches / batch,
        encode={name: value / count for name, value in tally.encode.items()},
    )
    return Probed(sizes, seconds, batch, kept, tally.samples)


def sample_order(views: Sequence[View], images: int) -> list[tuple[View, int]]:
    """Return items of all `views` and images in an order of which every beginning is spread over both; always the same.

    At most `MOST_ITEMS` of them.
    """
    total = len(views) * images
    chosen = random.Random(0).sample(range(total), min(total, MOST_ITEMS)) if total else []
    return [(views[number // images], number % images) for number in chosen]


def _one_batch(
    dataset: ViewDataset,
    teacher: Teacher,
    codecs: Mapping[str, ViewCodec],
    part: Sequence[tuple[View, int]],
    batch: int,
    tally: _Tally,
) -> None:
    held = len(dataset.decoded)
    started = time.perf_counter()
    samples = [dataset.sample(view, index) for view, index in part]
    cold = time.perf_counter() - started
    if new := len(dataset.decoded) - held:  # again, to tell making a view from reading the files that it is made of
        started = time.perf_counter()
        samples = [dataset.sample(view, index) for view, index in part]
        warm = min(cold, time.perf_counter() - started)
        tally.decode += cold - warm
        tally.decoded += new
        tally.made_of.append(new / len(part))
        cold = warm
    if not tally.batches:
        teacher(samples, batch=batch)  # the first pass warms up
    before, started = teacher.forward_seconds, time.perf_counter()
    targets = teacher(samples, batch=batch)
    tally.teacher += time.perf_counter() - started
    tally.forward += teacher.forward_seconds - before
    tally.views += cold
    tally.items += len(part)
    tally.batches += 1
    tally.samples = samples
    for name, codec in codecs.items():
        started = time.perf_counter()
        _encode(dataset, codec, part, samples, targets, tally.rows.setdefault(name, {}).setdefault(part[0][0].kind, {}))
        tally.encode[name] = tally.encode.get(name, 0.0) + time.perf_counter() - started


def _encode(
    dataset: ViewDataset,
    codec: ViewCodec,
    part: Sequence[tuple[View, int]],
    samples: Sequence[ViewSample],
    targets: Sequence[SampleTargets],
    rows: dict[str, list[np.ndarray]],
) -> None:
    for (view, index), sample, said in zip(part, samples, targets, strict=True):
        try:
            row = codec.encode(said)
        except AlarmError as error:
            place = f"view {view.name}, item {index} ({dataset.image_name(index)})"
            raise AlarmError(f"{place}: {error}; what is committed stays") from error
        row.update(sample.packed)
        noise = np.random.default_rng(len(rows.get(PIXEL_HASH.name, []))).bytes(PIXEL_HASH.row_bytes)
        row[PIXEL_HASH.name] = np.frombuffer(noise, np.uint8)  # as incompressible as a hash
        for name, values in row.items():
            rows.setdefault(name, []).append(values)


def _measure(
    kind: str, codecs: Mapping[str, ViewCodec], dataset: ViewDataset, tally: _Tally, sizes: dict[str, dict[str, Sizes]]
) -> None:
    """Compress the rows of a kind that came since, as a writer would, and add their bytes."""
    for name, codec in codecs.items():
        started = time.perf_counter()
        found = measure_rows(tally.rows[name].pop(kind), stored_columns(codec, dataset.packing), len(dataset))
        tally.encode[name] += time.perf_counter() - started
        before = sizes[name].get(kind)
        sizes[name][kind] = {
            array: np.concatenate([before[array], values]) if before else values for array, values in found.items()
        }


def _error(arrays: Sizes) -> float:
    """Return the standard error of the mean bytes of an item, relative."""
    items = np.sum(list(arrays.values()), axis=0)
    return float(items.std() / np.sqrt(len(items)) / items.mean())


def _images_kept(dataset: ViewDataset) -> bool:
    decoded = dataset.decoded
    return len(decoded) == 0 or decoded.held / len(decoded) * len(dataset) <= decoded.limit


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use `count` torch threads inside: importing or running Ultralytics may have left only one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
