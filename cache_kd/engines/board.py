"""In: units of work and what workers say of them. Out: who does what next, and when there is no point in going on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, final

HOPELESS = 3
"""So many units failed and none done, or so many times a worker ended before it had one: going on is pointless."""


@dataclass(frozen=True)
class Advanced:
    """So many more items of a unit are made."""

    unit: Hashable
    items: int


@dataclass(frozen=True)
class Done:
    """A unit is committed, now or before."""

    unit: Hashable


@dataclass(frozen=True)
class Failed:
    """An attempt at a unit failed; it will be tried again, on its own, after the rest."""

    unit: Hashable
    reason: str


@dataclass(frozen=True)
class GivenUp:
    """A unit has no attempt left."""

    unit: Hashable
    reason: str


@dataclass(frozen=True)
class Lost:
    """The worker that had a unit ended in the middle of it; another one will try it again."""

    unit: Hashable
    reason: str


Event = Advanced | Done | Failed | GivenUp | Lost
Tell = Callable[[Event], None]


class UnitWorker(Protocol):
    """Does units; made once in the process that does them."""

    def do(self, units: Iterator[Any], tell: Tell) -> None:
        """Do units as they come and tell of each; it may ask for the next one before it is done with the last."""
        ...


class Channel(Protocol):
    """How a worker reaches the board."""

    def take(self, *, wait: bool) -> Any | None:
        """Return a unit, None if there is none now or, having waited, if all are settled."""
        ...

    def tell(self, event: Event) -> None: ...


class Engine(Protocol):
    """Has the units of a board done by workers, somewhere."""

    def run(self, board: Board, tell: Tell) -> None:
        """Return when every unit is settled or the board is hopeless; `tell` gets every event, in this process.

        Raises:
            CacheKDError: What ended a worker and would end the others too, as a full disk.
        """
        ...


def serve(worker: UnitWorker, channel: Channel) -> None:
    """Have a worker do units until all are settled."""
    while (unit := channel.take(wait=True)) is not None:
        worker.do(chain([unit], iter(lambda: channel.take(wait=False), None)), channel.tell)


@final
class Board:
    """The units of one extraction: open, held by a worker, settled. It knows no process and no store.

    A unit is settled by `Done` or `GivenUp`; how often it may be tried, the store knows. What failed once waits until
    the rest is done and is then done alone: where a worker had asked for several units ahead and died, only one of them
    was the cause.
    """

    def __init__(self, units: Sequence[Hashable], items: Mapping[Any, int] | None = None) -> None:
        """Open a board; `items`: how many of them a unit has, for the progress."""
        self._fresh, self._again = deque(units), deque[Hashable]()
        self._items = items or {}
        self._held: dict[int, dict[Hashable, int]] = {}
        self._done: set[Hashable] = set()
        self._barren: dict[int, int] = {}
        self._abandoned = ""
        self.given_up: dict[Hashable, str] = {}
        self.faults: dict[Hashable, str] = {}

    @property
    def finished(self) -> bool:
        """Whether every unit is settled."""
        return not (self._fresh or self._again or any(self._held.values()))

    @property
    def open(self) -> int:
        """The units that no worker has yet."""
        return len(self._fresh) + len(self._again)

    @property
    def held(self) -> list[Any]:
        """The units that workers have."""
        return [unit for held in self._held.values() for unit in held]

    @property
    def hopeless(self) -> str:
        """Why there is no point in going on; "" as long as there is."""
        if not self._done and len(self.faults) >= HOPELESS:
            return f"the first {len(self.faults)} units failed"
        return self._abandoned

    @property
    def items_done(self) -> int:
        """Items of the units that are done, and those made so far of the ones that are held."""
        return sum(self._items.get(unit, 0) for unit in self._done) + sum(
            items for held in self._held.values() for unit, items in held.items() if unit not in self._done
        )

    def take(self, worker: int) -> Any | None:
        """Return the next unit for a worker, which holds it from now on; None: there is none for it now."""
        held = self._held.setdefault(worker, {})
        if self.hopeless:
            return None
        if self._fresh:
            unit = self._fresh.popleft()
        elif self._again and not held:
            unit = self._again.popleft()
        else:
            return None
        held[unit] = 0
        return unit

    def tell(self, worker: int, event: Event) -> None:
        """Take note of what a worker says."""
        held = self._held.setdefault(worker, {})
        if isinstance(event, Advanced):
            held[event.unit] = held.get(event.unit, 0) + event.items
            return
        held.pop(event.unit, None)
        if isinstance(event, Done):
            self._done.add(event.unit)
            self._barren.pop(worker, None)
            self.faults.pop(event.unit, None)
        elif isinstance(event, GivenUp):
            self.given_up[event.unit] = self.faults[event.unit] = event.reason
        else:
            self._try_again(event.unit, event.reason)

    def lose(self, worker: int, reason: str) -> list[Lost]:
        """Open what a worker that ended held; returns what was lost."""
        held = list(self._held.pop(worker, {}))
        if not held:
            self._barren[worker] = self._barren.get(worker, 0) + 1
        for unit in held:
            self._try_again(unit, reason)
        return [Lost(unit, reason) for unit in held]

    def tired(self, worker: int) -> bool:
        """Return whether a worker ended so often before it had a unit that it is not started again."""
        return self._barren.get(worker, 0) >= HOPELESS

    def abandon(self, reason: str) -> None:
        """Say that no worker is left."""
        self._abandoned = f"every worker ended before it began a unit: {reason}"

    def _try_again(self, unit: Hashable, reason: str) -> None:
        if unit in self._done:
            return
        self._again.append(unit)
        self.faults[unit] = reason
