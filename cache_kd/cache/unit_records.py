"""In: a cache that is being written. Out: which of its units are finished, by records that the files bear out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cache_kd.cache.files import parse_json
from cache_kd.cache.layout import ArrayLayout
from cache_kd.cache.manifest import MAX_JSON_BYTES
from cache_kd.cache.records import UNITS, FileEntry, UnitRecord, parse_record, record_path, recorded_unit
from cache_kd.cache.store import Store
from cache_kd.errors import DamagedCacheError
from cache_kd.structures import View

_LISTED = 8
_log = logging.getLogger(__name__)


class UnitRecords:
    """The records of a cache's units; one whose files are gone or of another size is dropped, with a warning.

    Args:
        hold: called before a record is dropped; takes the writer's lock if it was given back.
    """

    def __init__(self, store: Store, layouts: Mapping[str, ArrayLayout], hold: Callable[[], None]) -> None:
        self._store = store
        self._layouts = layouts
        self._hold = hold

    def find(self, view: View, shard: int) -> UnitRecord | None:
        """Return the record of a finished unit, None of another one."""
        try:
            data = self._read(view, shard)
            if data is None:
                return None
            record = parse_record(data, view, shard, self._layouts)
            for entry in record.files:
                self._check_file(entry)
            return record
        except DamagedCacheError as error:
            _log.warning("%s shard %d is done again: %s", view.name, shard, error)
        self._hold()
        self.drop(view, shard)
        return None

    def find_all(self, units: Sequence[tuple[View, int]]) -> list[UnitRecord | None]:
        """Return what `find` says of each unit, asked at once where a server answers."""
        if self._store.parallel < 2:
            return [self.find(*unit) for unit in units]
        with ThreadPoolExecutor(self._store.parallel) as pool:
            return list(pool.map(lambda unit: self.find(*unit), units))

    def named(self) -> set[tuple[View, int]]:
        """Return the units of which there is a record, by their names alone."""
        return {unit for path, _ in self._store.files(UNITS) if (unit := recorded_unit(path)) is not None}

    def attempts(self, view: View, shard: int) -> int:
        """Return how often the unit was recorded before, as far as its record tells."""
        try:
            data = self._read(view, shard)
        except DamagedCacheError:
            return 1
        return data["attempt"] if isinstance(data, dict) and type(data.get("attempt")) is int else 0

    def drop(self, view: View, shard: int) -> None:
        """Delete a record: its unit counts as not done."""
        self._store.delete(record_path(view, shard))

    def files(self, units: Sequence[tuple[View, int]]) -> dict[View, list[FileEntry]]:
        """Return the files of the units by view; raises `DamagedCacheError` listing those that are not finished."""
        entries: dict[View, list[FileEntry]] = {}
        missing: list[str] = []
        for (view, shard), record in zip(units, self.find_all(units), strict=True):
            if record is None:
                missing.append(f"{view.name} shard {shard}")
            else:
                entries.setdefault(view, []).extend(record.files)
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            raise DamagedCacheError(
                f"{self._store.place}: unfinished, missing {', '.join(missing[:_LISTED])}{more}; "
                "run the same `cache-kd extract` again"
            )
        return entries

    def _read(self, view: View, shard: int) -> Any:
        """Return the JSON of the unit's record; None if there is no such file."""
        relative = record_path(view, shard)
        content = self._store.find(relative, MAX_JSON_BYTES)
        return None if content is None else parse_json(content, self._store.where(relative))

    def _check_file(self, entry: FileEntry) -> None:
        size = self._store.size(entry.path)
        if size is None:
            raise DamagedCacheError(f"{self._store.where(entry.path)} is missing")
        if size != entry.bytes:
            raise DamagedCacheError(f"{self._store.where(entry.path)} has {size} bytes, its record says {entry.bytes}")
