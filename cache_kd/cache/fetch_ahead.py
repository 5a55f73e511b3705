"""In: the shards that a run will read, group by group. Out: local copies of them before they are needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import final

from cache_kd.cache.object_store import ObjectStore
from cache_kd.cache.records import FileEntry
from cache_kd.errors import CacheKDError

AT_ONCE = 4
_log = logging.getLogger(__name__)
Group = Sequence[FileEntry]


@final
class FetchAhead:
    """Fetches groups of shards in their order, as far as the group in use and all those after it fit the limit.

    Whoever reads fetches what is not there yet: this only spares it the wait, and leaves faults for it to say.
    """

    def __init__(self, store: ObjectStore, groups: Iterator[Group]) -> None:
        self._store, self._groups = store, groups
        self._held: list[Group] = []
        self._used = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="cache-kd-fetch-ahead")
        self._thread.start()

    def use(self, group: int) -> None:
        """Say that the group of this number, from 0, is in use, and those before it are done with."""
        with self._changed:
            self._used = max(self._used, group)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop after the shards in work."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for group in self._groups:
                if not self._wait_for_room(group):
                    return
                self._keep()
                list(pool.map(self._fetch, group))

    def _wait_for_room(self, group: Group) -> bool:
        """Wait until `group` fits beside what is needed before it; returns whether to go on."""
        with self._changed:
            self._held.append(group)
            while not self._closed and self._used < len(self._held) - 1 and self._bytes() > self._store.fetching.limit:
                self._changed.wait()
            return not self._closed

    def _keep(self) -> None:
        """Make what is still needed the copies that are deleted last: some of it waits unread since it was fetched."""
        for group in self._held[self._used : -1]:
            for entry in group:
                self._store.keep(entry)

    def _bytes(self) -> int:
        return sum({entry.sha256: entry.bytes for group in self._held[self._used :] for entry in group}.values())

    def _fetch(self, entry: FileEntry) -> None:
        if self._closed:
            return
        try:
            self._store.fetch(entry)
        except CacheKDError as error:
            _log.debug("not fetched ahead: %s", error)
