"""In: what a sample of items took. Out: bytes, seconds, read rate and break-even of a whole extraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cache_kd.pipeline.probe import Probed

RATE = 100.0
"""Images a second at which reading is stated where no training step was measured."""


@dataclass(frozen=True)
class Workload:
    """What is to be extracted.

    Attributes:
        items: by kind of view. images: of the data set. passes: forward passes in all, those of cut batches counted
            whole. workers: processes that make views; 0: this one. write_rate: bytes a second of the disk.
        fixed_bytes: what is written once: the teacher's head, lists and records.
    """

    items: Mapping[str, int]
    images: int
    passes: int
    workers: int
    write_rate: float
    fixed_bytes: int = 0


@dataclass(frozen=True)
class Forecast:
    """What an extraction costs and what a training gains.

    Attributes:
        bytes_per_view: of an item, mean over all views. bytes: of all items and what is written once.
        read_bytes: of a view, those that the default losses read.
        break_even: epochs of students after which the extraction has cost less time than a live teacher's forward
            passes would have; None for a teacher that took no time.
    """

    items: int
    bytes_per_view: float
    bytes: float
    seconds: float
    read_bytes: float
    break_even: float | None


def forecast(probed: Probed, fidelity: str, work: Workload, arrays_read: Sequence[str]) -> Forecast:
    """Return the figures of an extraction at a fidelity that was probed."""
    items = sum(work.items.values())
    size = sum(count * probed.item_bytes(fidelity, kind) for kind, count in work.items.items())
    read = sum(count * probed.item_bytes(fidelity, kind, arrays_read) for kind, count in work.items.items())
    seconds = _seconds(probed, fidelity, work, size)
    per_view = max(1, items)
    return Forecast(
        items=items,
        bytes_per_view=size / per_view,
        bytes=size + work.fixed_bytes,
        seconds=seconds,
        read_bytes=read / per_view,
        break_even=break_even(seconds, work.images, probed.seconds.forward),
    )


def break_even(seconds: float, images: int, forward: float) -> float | None:
    """Return the epochs in which a live teacher's forward passes take as long as the extraction."""
    return seconds / (images * forward) if forward > 0 else None


def passes_of(images: int, shard: int, batch: int) -> int:
    """Return the forward passes over one view: a batch never straddles two shards."""
    whole, rest = divmod(images, shard)
    return whole * -(-shard // batch) + -(-rest // batch)


def _seconds(probed: Probed, fidelity: str, work: Workload, size: float) -> float:
    """Return the wall time: one after the other, or beside each other where processes of their own make the views."""
    items, each = sum(work.items.values()), probed.seconds
    decodes = work.images if probed.images_kept else items * each.images
    targets = work.passes * probed.batch * each.teacher + items * each.encode[fidelity] + size / work.write_rate
    if not work.workers:
        return items * each.views + decodes * each.decode + targets
    shared = 1 if probed.images_kept else work.workers  # each process reads every image once and keeps it
    return max(items * each.views / work.workers + decodes * each.decode / shared, targets)
