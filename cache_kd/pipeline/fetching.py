"""In: a run's losses and a cache that may lie elsewhere. Out: how the run shuffles, and its shards fetched ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cache_kd.cache.fetch_ahead import FetchAhead
from cache_kd.cache.layout import length_name
from cache_kd.cache.object_store import ObjectStore
from cache_kd.cache.records import FileEntry
from cache_kd.errors import SettingError
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.sizes import megabytes
from cache_kd.structures import PIXEL_HASH, View
from cache_kd.student.order import ShuffleWindow, shard_groups
from cache_kd.student.schedule import ViewSchedule

WINDOWS = 2
"""Windows that fit the limit together: the one in use, and the next one, which is fetched meanwhile."""


def arrays_read(cache: Cache, columns: Iterable[str], *, proven: bool) -> frozenset[str]:
    """Return the stored arrays that a run reads: the columns of its losses, packed views, with `proven` the hashes."""
    names = {*columns}
    if cache.packing is not None:
        names |= {column.name for column in cache.packing.columns(cache.manifest.imgsz)}
    if proven:
        names.add(PIXEL_HASH.name)
    names |= {length_name(name) for name in names}
    return frozenset(names & {*cache.reader.layouts})


def shard_entries(cache: Cache, view: View, arrays: frozenset[str], shard: int) -> list[FileEntry]:
    """Return the files of one shard of a view that hold these arrays."""
    files = cache.reader.files(view)
    return [files[cache.reader.layouts[name].shard_path(view, shard)] for name in sorted(arrays)]


def shuffle_window(
    cache: Cache, views: Sequence[View], arrays: frozenset[str], asked: int | None, say: Callable[[str], None]
) -> ShuffleWindow | None:
    """Return the window in whose shards a run shuffles; None: over all images.

    Args:
        arrays: as of `arrays_read`. asked: shards of the window, as the user says; None takes all shards, and of a
            cache elsewhere as many as fit the limit of local copies.

    Raises:
        SettingError: No shard at all fits, or not as many as asked for.
    """
    samples, store = cache.manifest.shard_size, cache.reader.store
    count = -(-cache.manifest.num_images // samples)
    if asked is not None and asked < 1:
        raise SettingError(f"--shuffle-window {asked}; allowed: 1 or more shards, of which a view has {count}")
    if not isinstance(store, ObjectStore) or not arrays:
        return None if asked is None or asked >= count else ShuffleWindow(samples, asked)
    sizes = [_shard_bytes(cache, view, arrays) for view in {view.kind: view for view in views}.values()]
    limit, largest, whole = store.fetching.limit, max(map(max, sizes)), max(map(sum, sizes))
    wanted = whole if asked is None or asked >= count else asked * largest
    if wanted <= limit:
        return None if asked is None or asked >= count else ShuffleWindow(samples, asked)
    fitting = limit // (WINDOWS * largest)
    if asked is not None or not fitting:
        needed = megabytes(wanted if asked is not None else WINDOWS * largest)
        raise SettingError(
            f"--fetch-limit {megabytes(limit)} is too little for {asked or 1} of {count} shards of a view, of which "
            f"each takes up to {megabytes(largest)}; allowed: {needed} or more, for all shards {megabytes(whole)}"
        )
    say(
        f"a view takes {megabytes(whole)}, local copies at most {megabytes(limit)}: images are shuffled within windows "
        f"of {fitting} shards of {samples}, not over all; the same from any place: --shuffle-window {fitting}"
    )
    return ShuffleWindow(samples, fitting)


def _shard_bytes(cache: Cache, view: View, arrays: frozenset[str]) -> list[int]:
    """Return what these arrays of each shard take; views of a kind differ by little, so that one stands for all."""
    shards = range(-(-cache.manifest.num_images // cache.manifest.shard_size))
    return [sum(entry.bytes for entry in shard_entries(cache, view, arrays, shard)) for shard in shards]


def fetch_ahead(trainer: Any, cache: Cache, arrays: frozenset[str], window: ShuffleWindow | None) -> None:
    """Have a trainer's shards fetched while it trains; nothing to do for a cache on this machine's disks."""
    store = cache.reader.store
    if not isinstance(store, ObjectStore) or not arrays:
        return
    ahead = _WhileTraining(store, _Reads(cache, arrays, window))
    trainer.add_callback("on_train_epoch_start", ahead.epoch_started)
    trainer.add_callback("on_train_batch_end", ahead.batch_ended)
    trainer.add_callback("on_train_end", ahead.ended)


class _WhileTraining:
    """Tells who fetches ahead how far a trainer is."""

    def __init__(self, store: ObjectStore, reads: _Reads) -> None:
        self._store, self._reads = store, reads
        self._ahead: FetchAhead | None = None
        self._first = self._batches = 0

    def epoch_started(self, trainer: Any) -> None:
        if self._ahead is None:
            self._first = int(trainer.epoch)
            schedule = trainer.train_loader.sampler.schedule
            groups = self._reads.groups(self._first, int(trainer.epochs), trainer.args.seed, schedule)
            self._ahead = FetchAhead(self._store, groups)
        self._batches = 0
        self._use(trainer, 0)

    def batch_ended(self, trainer: Any) -> None:
        self._batches += 1
        shown = self._batches * int(trainer.batch_size)
        self._use(trainer, min(shown // self._reads.a_group, self._reads.an_epoch - 1))

    def ended(self, _: Any) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _use(self, trainer: Any, group: int) -> None:
        if self._ahead is not None:
            self._ahead.use((int(trainer.epoch) - self._first) * self._reads.an_epoch + group)


class _Reads:
    """Which shards a run reads, and when."""

    def __init__(self, cache: Cache, arrays: frozenset[str], window: ShuffleWindow | None) -> None:
        self._cache, self._arrays, self._window = cache, arrays, window
        self._size, self._samples = cache.manifest.num_images, cache.manifest.shard_size
        shards = -(-self._size // self._samples)
        self.an_epoch = 1 if window is None else -(-shards // window.shards)
        self.a_group = self._size if window is None else window.shards * window.samples

    def groups(self, first: int, epochs: int, seed: int, schedule: ViewSchedule) -> Iterator[list[FileEntry]]:
        """Yield the files of each group of shards, from epoch `first` on."""
        for epoch in range(first, epochs):
            view = schedule.view(epoch)
            for group in shard_groups(self._size, self._samples, seed=seed, epoch=epoch, window=self._window):
                yield [entry for n in group for entry in shard_entries(self._cache, view, self._arrays, n)]
