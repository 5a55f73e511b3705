"""In: rows of targets, unit by unit. Out: a cache that holds whole shards only at every moment, manifest last."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, final

import numpy as np

from cache_kd.cache import creation
from cache_kd.cache.attempts import Attempts
from cache_kd.cache.extraction_plan import GIVEN, Plan, read_plan
from cache_kd.cache.files import parse_json, seal, sha256
from cache_kd.cache.layout import FORMAT, check_columns, group_metadata, layouts
from cache_kd.cache.manifest import (
    NAME,
    Manifest,
    columns_to_json,
    content_digest,
    read_manifest,
)
from cache_kd.cache.places import open_store
from cache_kd.cache.records import (
    FileEntry,
    UnitRecord,
    record_path,
    shards_json,
    shards_path,
)
from cache_kd.cache.store import Lock, Place, Store
from cache_kd.cache.unit_records import UnitRecords
from cache_kd.cache.units import check_rows, encode_unit
from cache_kd.errors import CacheKDError, DamagedCacheError, MissingFileError, SettingError
from cache_kd.fingerprint import canonical_json, digest_json
from cache_kd.structures import Column, HeadSpec, View

_RACES = 3
"""How often a unit is written again because another machine made other bytes of it at the same time."""
_log = logging.getLogger(__name__)


@final
class CacheWriter:
    """Writes one cache. Get one from `open_or_create`, or of one that was begun from `open_begun`.

    Several writers may be at work at once, of parts of the units or even of the same ones: files are renamed into
    place, a unit's record is created once, and who comes second keeps what is there.
    """

    def __init__(self, store: Store, begun: creation.Begun, lock: Lock) -> None:
        self.store = store
        self.begun = begun
        self.attempts = Attempts(store)
        self._lock = lock
        self._layouts = layouts(begun.columns, begun.num_images, begun.shard_size)
        self.records = UnitRecords(store, self._layouts, self._hold)
        self._described: set[View] = set()
        self._attempt: dict[tuple[View, int], int] = {}

    @classmethod
    def open_or_create(
        cls,
        place: Place | Store,
        *,
        identity: dict[str, Any],
        data: dict[str, Any],
        columns: tuple[Column, ...],
        num_images: int,
        teacher_arrays: dict[str, np.ndarray],
        shared: bool = False,
    ) -> CacheWriter:
        """Return the writer of the cache at `place`, which is created, or goes on where an earlier one ended.

        Args:
            identity: what the content depends on, JSON; parts that differ from the cache's are named.
            data: content of `data.json`, the ordered images.
            columns: columns of every view. num_images: rows of each.
            teacher_arrays: the teacher's head and what else students need of it, by name.
            shared: others may write at the same time if they say so too; else this writer is alone.

        Raises:
            MismatchError: a cache of another identity. SettingError: a folder of other things, or impossible columns.
            CacheKDError: another writer is at work, or the disk refuses.
        """
        store = open_store(place)
        check_columns(columns)
        if num_images < 1:
            raise SettingError(f"a cache needs at least one image, got {num_images}")
        start = creation.Start(identity, data, tuple(columns), num_images, teacher_arrays)
        fresh = creation.check_place(store) and store.exclusive
        store.begin()
        lock = store.lock(shared=shared)
        try:
            begun = creation.create_or_check(store, start, alone=not shared)
        except BaseException:
            if fresh and not shared and "units" not in (store.entries() or ()):  # an interrupt leaves nothing behind
                with contextlib.suppress(CacheKDError):
                    creation.discard(store)
            lock.release()
            raise
        return cls(store, begun, lock)

    @classmethod
    def open_begun(cls, place: Place | Store, *, shared: bool = False) -> CacheWriter:
        """Return a writer of the cache that was begun at `place`, by what is written there.

        Args:
            shared: take a lock beside other parts; else take none: the caller works for one who holds it.

        Raises:
            MissingFileError: no cache, or no extraction that was begun. DamagedCacheError: it cannot be read.
        """
        store = open_store(place)
        begun = read_plan(store).begun
        return cls(store, begun, store.lock(shared=True) if shared else _Lent())

    @property
    def place(self) -> Place:
        """Where the cache is."""
        return self.store.place

    @property
    def shard_size(self) -> int:
        """S, the samples of a shard; the same for equal columns."""
        return self.begun.shard_size

    @property
    def num_images(self) -> int:
        return self.begun.num_images

    def units(self, view: View) -> range:
        """Return the numbers of the shards of `view`; shard n holds the samples from n·S."""
        return range(-(-self.begun.num_images // self.shard_size))

    def samples(self, shard: int) -> range:
        """Return the indices of the samples of `shard`."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.begun.num_images))

    def done(self, view: View, shard: int) -> bool:
        """Return whether the unit is finished; a record whose files are gone or of another size is dropped."""
        return self.records.find(view, shard) is not None

    def unfinished(self, units: Sequence[tuple[View, int]]) -> list[tuple[View, int]]:
        """Return those of `units` that are not `done`, in their order."""
        return [unit for unit, record in zip(units, self.records.find_all(units), strict=True) if record is None]

    def plan(self, views: Sequence[View], manifest: dict[str, Any], parts: int = 1) -> None:
        """Write down what `finish` is going to say, for who has to do that without teacher and data set.

        Args:
            views: all that are extracted now; manifest: as `finish` takes it; parts: in how many parts.
        """
        _check_given(manifest)
        content = Plan(self.begun, tuple(sorted({*views, *self._earlier_views()})), manifest, parts).content()
        self._publish(creation.PLAN, content)

    @property
    def under_way(self) -> list[tuple[View, int]]:
        """The units that were begun here and are not done, the first one first."""
        return list(self._attempt)

    def begin_unit(self, view: View, shard: int) -> bool:
        """Count an attempt at a unit; returns False if there is none left."""
        number = self.attempts.begin(view, shard)
        if number is None:
            return False
        self._attempt[view, shard] = number
        return True

    def fail_unit(self, view: View, shard: int, reason: str) -> None:
        """Write down why an attempt at a unit failed."""
        self._attempt.pop((view, shard), None)
        self.attempts.fail(view, shard, reason)

    def withdraw_units(self) -> None:
        """Forget the attempts that are under way here: they are interrupted, and not by what they do."""
        for (view, shard), number in self._attempt.items():
            self.attempts.withdraw(view, shard, number)
        self._attempt.clear()

    def write_unit(
        self,
        view: View,
        shard: int,
        rows: dict[str, list[np.ndarray]],
        environment: dict[str, Any],
        *,
        seconds: Mapping[str, float] | None = None,
    ) -> UnitRecord:
        """Write one shard of all columns of `view` and its record; a finished unit is left as it is.

        Args:
            rows: of each column one array a sample in order; ragged rows are 1-D u8. Length columns are added here.
            environment: JSON about where and with what this was computed.
            seconds: what that took, by stage; "write" is added here.

        Raises:
            InputDataError: rows that do not fit the columns. DiskSpaceError, CacheKDError: the disk refuses.
        """
        if shard not in self.units(view):
            raise SettingError(
                f"no shard {shard} of {view.name}: a cache of {self.num_images} images has {len(self.units(view))}"
            )
        check_rows(rows, self.begun.columns, self.samples(shard), shard)
        self._hold()
        earlier = self.records.attempts(view, shard)
        record = self.records.find(view, shard)
        for _ in range(_RACES):
            if record is not None:
                break
            attempt = earlier + self._attempt.get((view, shard), 1)
            record = self._written(view, shard, rows, attempt, environment, seconds)
        else:
            raise CacheKDError(
                f"{self.store.where(record_path(view, shard))}: other writers make this unit too, with other bytes; "
                "run the same command again when they are done"
            )
        self.attempts.clear(view, shard, self._attempt.pop((view, shard), 0))
        return record

    def _written(
        self,
        view: View,
        shard: int,
        rows: dict[str, list[np.ndarray]],
        attempt: int,
        environment: dict[str, Any],
        seconds: Mapping[str, float] | None,
    ) -> UnitRecord | None:
        """Write a unit and return its record, its own or an equal one that came first; None if it has to be redone."""
        self._describe(view)
        started = time.perf_counter()
        files, replaced = [], list[FileEntry]()
        for entry, content in encode_unit(rows, self._layouts, view, shard):
            if not self.store.create(entry.path, content):
                if found := self.records.find(view, shard):  # never write over what is published
                    return self._trusted(found, replaced)
                self.store.write(entry.path, content)
                replaced.append(entry)
            files.append(entry)
        taken = {} if seconds is None else {**seconds, "write": round(time.perf_counter() - started, 6)}
        record = UnitRecord(view, shard, attempt, environment, tuple(files), taken)
        relative = record_path(view, shard)
        if self.store.create(relative, record.content()):
            return record
        other = self.records.find(view, shard)
        return None if other is None else self._trusted(other, replaced)

    def _trusted(self, found: UnitRecord, replaced: Sequence[FileEntry]) -> UnitRecord | None:
        """Return another writer's record of a unit that this one was making too; drop it if its files may not be there.

        What this writer created, the other one replaced; what this writer replaced, it may have done after the other.
        """
        if {*replaced} <= {*found.files}:
            return found
        self.records.drop(found.view, found.shard)
        return None

    def finish(self, views: Sequence[View], manifest: dict[str, Any]) -> Manifest:
        """Publish `views`, and those an earlier manifest lists, as a complete cache; returns its manifest.

        Args:
            manifest: JSON under teacher, head (or a `HeadSpec`), codec, imgsz, seed, recipe, environment.

        Raises:
            DamagedCacheError: units are missing; the message lists them.
        """
        _check_given(manifest)
        self._hold()
        every = sorted({*views, *self._earlier_views()})
        if not every:
            raise SettingError("a cache needs at least one view, got none")
        entries = self.records.files([(view, shard) for view in every for shard in self.units(view)])
        shards: dict[str, str] = {}
        for view in every:
            content = shards_json(view, entries[view])
            shards[view.name] = sha256(content)
            self._publish(shards_path(view), content)
        result = self._manifest(every, shards, entries, manifest)
        self._publish(NAME, seal(result.to_json()))
        self._forget_plan(every)
        self.close()
        return result

    def sign(self) -> None:
        """Show other machines that this writer lives; see `WriterLock`. Call it with every batch, it costs nothing."""
        self._lock.sign()

    def close(self) -> None:
        """Let other writers in; writing again takes the lock again."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hold(self) -> None:
        if not self._lock.is_locked:
            self._lock = self.store.lock()

    def _forget_plan(self, views: Sequence[View]) -> None:
        """Delete what only an unfinished extraction needs, unless another one wants more views meanwhile."""
        self.attempts.forget((view, shard) for view in views for shard in self.units(view))
        try:
            wanted = read_plan(self.store).views
        except (DamagedCacheError, MissingFileError):
            wanted = ()
        if {*wanted} <= {*views}:
            self.store.delete(creation.PLAN)

    def _describe(self, view: View) -> None:
        """Write the view's group and array metadata unless they are there."""
        if view in self._described:
            return
        for group in ("views", f"views/{view.name}"):
            self._publish(f"{group}/zarr.json", canonical_json(group_metadata({})))
        for layout in self._layouts.values():
            self._publish(f"{layout.folder(view)}/zarr.json", canonical_json(layout.metadata()))
        self._described.add(view)

    def _publish(self, relative: str, content: bytes) -> None:
        """Write `content` unless the file holds it already: topping up touches no file of an older view."""
        if self.store.size(relative) != len(content) or self.store.read(relative, len(content)) != content:
            self.store.write(relative, content)

    def _earlier_views(self) -> tuple[View, ...]:
        if not self.store.exists(NAME):
            return ()
        try:
            return read_manifest(self.store).views
        except DamagedCacheError as error:
            _log.warning("the earlier manifest is replaced: %s", error)
            return ()

    def _manifest(
        self, views: Sequence[View], shards: dict[str, str], entries: dict[View, list[FileEntry]], given: dict[str, Any]
    ) -> Manifest:
        head = given["head"]
        files = [(entry.path, entry.sha256) for view in views for entry in entries[view]]
        plain = {
            **given,
            "head": head.to_json() if isinstance(head, HeadSpec) else head,
            "format": FORMAT,
            "identity": self.begun.identity,
            "identity_digest": digest_json(self.begun.identity),
            "arrays": {
                name: {"dtype": array.dtype, "shape": list(array.shape), "sha256": array.sha256}
                for name, array in self.begun.arrays.items()
            },
            "columns": columns_to_json(self.begun.columns),
            "num_images": self.begun.num_images,
            "shard_size": self.shard_size,
            "views": [view.name for view in views],
            "data_sha256": self.begun.data_sha256,
            "shards": shards,
            "digest": content_digest(self.begun.identity, files),
        }
        where = f"{self.store.where(NAME)} as it would be written"
        return Manifest.from_json(parse_json(canonical_json(plain), where), where)


def _check_given(manifest: Mapping[str, Any]) -> None:
    if set(manifest) != set(GIVEN):
        raise SettingError(f"a manifest is given exactly {', '.join(GIVEN)}; got {', '.join(sorted(manifest))}")


class _Lent:
    """The lock of one who works for its holder."""

    is_locked = True

    def sign(self) -> None:
        """Its holder gives the signs."""

    def release(self) -> None:
        """It is not this one's to give back."""
