"""In: what makes a worker. Out: the units of a board, done by actors of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

from cache_kd.engines.board import Board, Event, Tell, UnitWorker, serve
from cache_kd.errors import CacheKDError, SettingError

GRACE = 5.0
"""Seconds that actors have to end when they are told to."""
PATIENCE = 30.0
"""Seconds without any worker after which that is said, again and again."""
POLL = 0.5
CONNECT = 5.0
"""Seconds for an answer of the cluster's head."""
_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class RayEngine:
    """Has units done by actors, each of which makes its worker once; they write to the store themselves.

    Ray is asked to place actors and to say when they die, nothing more. Who does which unit is this process' board;
    how often a unit was tried, the store knows: Ray itself would try one that kills its worker for ever. An actor that
    finds no place is waited for while the others work, so resources that are short slow a job down and do not stop it.

    Attributes:
        maker: sent through Ray's object store, once a node. count: actors; None: as many as have room.
        threads: CPUs that an actor asks for where it asks for no GPU; None: 4, or those of the smallest node.
        gpus: take the cluster's GPUs if it has some.
        address: of the cluster; None: RAY_ADDRESS, else the one on this machine, else a new one.
    """

    maker: Callable[[int], UnitWorker]
    count: int | None = None
    threads: int | None = None
    address: str | None = None
    gpus: bool = True

    def run(self, board: Board, tell: Tell) -> None:
        ray = _ray()
        with _connected(ray, self.address):
            share = _share(ray, self.threads, self.gpus)
            count = min(self.count or share.count, max(1, board.open))
            _log.info("%d Ray actors, each with %s", count, share)
            _Crew(ray, share, count, ray.put(self.maker)).run(board, tell)


def _ray() -> Any:
    """Return the library; raises `SettingError` without it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without GPUs: the future's default
    try:
        import ray
    except ImportError as error:
        raise SettingError("--engine ray needs Ray; run: pip install 'cache-kd[ray]'") from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Be connected to a cluster inside; one that the program was connected to already is left so."""
    if ray.is_initialized():
        yield
        return
    _check_address(address or os.environ.get("RAY_ADDRESS"))
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, namespace=f"cache-kd-{uuid.uuid4()}", log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise SettingError(
            f"--engine ray: no cluster at {where}: {' '.join(str(error).split())[:200]}; "
            "start one with `ray start --head`, or leave --address out for one on this machine"
        ) from error
    try:
        if main and before is not None:  # Ray has set its own, which ends the process without a word to the workers
            signal.signal(signal.SIGTERM, before)
        yield
    finally:
        ray.shutdown()


def _check_address(address: str | None) -> None:
    """Raise `SettingError` for an address at which nobody listens: Ray 2.60 would wait there for minutes."""
    if address in (None, "auto", "local"):
        return
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise SettingError(f"--address {address!r}; allowed: auto, local, or HOST:PORT of the cluster's head")
    try:
        socket.create_connection((host, int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        raise SettingError(
            f"--engine ray: no cluster at {address}: {error}; start one with `ray start --head`, or leave "
            "--address out for one on this machine"
        ) from error


@dataclass(frozen=True)
class _Share:
    """What one actor asks for, and how many such actors the cluster has room for."""

    gpus: int
    threads: int
    count: int

    def __str__(self) -> str:
        return "a GPU" if self.gpus else f"{self.threads} CPUs"

    def options(self) -> dict[str, Any]:
        # An actor with a GPU asks for no CPU: others that took all of them would keep it waiting without a word.
        asked = {"num_gpus": 1, "num_cpus": 0} if self.gpus else {"num_cpus": self.threads}
        return {**asked, "max_restarts": 0, "scheduling_strategy": "SPREAD"}


def _share(ray: Any, threads: int | None, use_gpus: bool) -> _Share:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if use_gpus and (gpus := int(sum(node.get("GPU", 0) for node in nodes))):
        share = min((int(node.get("CPU", 1) // node["GPU"]) for node in nodes if node.get("GPU")), default=1)
        return _Share(1, threads or max(1, share), gpus)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise SettingError("--engine ray: the cluster has neither GPUs nor CPUs; start nodes with some: ray start")
    each = threads or min(4, *cores)
    if each > max(cores):
        raise SettingError(f"--threads {each}: the largest node of the cluster has {max(cores)} CPUs")
    return _Share(0, each, sum(node // each for node in cores))


# -- in this process ------------------------------------------------------------------------------------------------


@dataclass
class _Slot:
    """One place of the crew; `turn` counts the actors that filled it, so that no word of a dead one is taken."""

    number: int
    turn: int = 0
    actor: Any = None
    end: Any = None
    heard: bool = False
    waiting: bool = False
    last_word: str = ""


@dataclass
class _Crew:
    ray: Any
    share: _Share
    count: int
    maker: Any
    desk: Any = field(init=False)
    slots: list[_Slot] = field(init=False)

    def run(self, board: Board, tell: Tell) -> None:
        here = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            self.ray.get_runtime_context().get_node_id(), soft=False
        )
        self.desk = self.ray.remote(_Desk).options(num_cpus=0, scheduling_strategy=here).remote()
        self.slots = [_Slot(number) for number in range(self.count)]
        try:
            for slot in self.slots:
                self._start(slot)
            self._work(board, tell)
        finally:
            self._stop()

    def _work(self, board: Board, tell: Tell) -> None:
        heard = time.monotonic()
        while not (board.finished or board.hopeless):
            for slot in self.slots:
                if slot.waiting:
                    self._give(slot, board.take(slot.number), final=False)
            for slot_number, turn, kind, content in self.ray.get(self.desk.words.remote(POLL)):
                slot = self.slots[slot_number]
                if turn == slot.turn:
                    heard, slot.heard = time.monotonic(), True
                    self._hear(slot, kind, content, board, tell)
            self._bury_dead(board, tell)
            if time.monotonic() - heard > PATIENCE and not any(slot.heard for slot in self.slots):
                heard = time.monotonic()
                _log.warning("no worker has begun: each asks for %s, free are %s", self.share, self._free())

    def _hear(self, slot: _Slot, kind: str, content: Any, board: Board, tell: Tell) -> None:
        if kind == "tell":
            board.tell(slot.number, content)
            tell(content)
        else:
            slot.waiting = True
            self._give(slot, board.take(slot.number), final=not content)

    def _give(self, slot: _Slot, unit: Any, *, final: bool) -> None:
        """Answer a worker that asks; None only if it does not want to wait."""
        if unit is not None or final:
            slot.waiting = False
            self.desk.give.remote(slot.number, slot.turn, unit)

    def _bury_dead(self, board: Board, tell: Tell) -> None:
        alive = {slot.end: slot for slot in self.slots if slot.end is not None}
        ended, _ = self.ray.wait(list(alive), num_returns=len(alive), timeout=0) if alive else ([], [])
        for reference in ended:
            slot = alive[reference]
            slot.last_word = self._last_word(slot)
            _log.warning("Ray actor %d is gone: %s", slot.number, slot.last_word)
            for event in board.lose(slot.number, slot.last_word):
                tell(event)
            slot.actor = slot.end = None
        for slot in self.slots:
            if slot.end is None and board.open and not board.tired(slot.number):
                self._start(slot)
        if all(slot.end is None for slot in self.slots) and not board.finished:
            board.abandon(self.slots[0].last_word)

    def _last_word(self, slot: _Slot) -> str:
        """Return why an actor ended; raises `CacheKDError` for what would end the others too."""
        errors = self.ray.exceptions
        try:
            self.ray.get(slot.end)
        except errors.RayTaskError as error:
            cause = error.cause if hasattr(error, "cause") else error
            if isinstance(cause, CacheKDError):
                raise cause from None
            return f"{type(cause).__name__}: {' '.join(str(cause).split())[-300:]}"
        except errors.RayError as error:
            return _obituary(str(error))
        return "it ended"

    def _start(self, slot: _Slot) -> None:
        slot.turn, slot.waiting, slot.heard = slot.turn + 1, False, False
        slot.actor = self.ray.remote(_Actor).options(**self.share.options()).remote()
        slot.end = slot.actor.work.remote(self.maker, self.share.threads, self.desk, slot.number, slot.turn)

    def _free(self) -> str:
        free = self.ray.available_resources()
        return f"{free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPUs"

    def _stop(self) -> None:
        """Have the actors end: at their next word, or after a while at once."""
        self.desk.close.remote()
        ends = [slot.end for slot in self.slots if slot.end is not None and slot.heard]
        if ends:
            self.ray.wait(ends, num_returns=len(ends), timeout=GRACE)
        for slot in self.slots:
            if slot.actor is not None:
                self.ray.kill(slot.actor)
        self.ray.kill(self.desk)


def _obituary(text: str) -> str:
    """Return why an actor died in a few of Ray's many words."""
    found = [match[1] for name in ("pid", "ip") if (match := re.search(rf"^\s*{name}: (\S+)", text, re.MULTILINE))]
    where = f" (process {found[0]} on {found[1]})" if len(found) == 2 else ""
    if re.search(r"node (has|was|is)? ?(died|dead|terminated|removed)", text) or "node failure" in text:
        return f"its node died{where}"
    return f"its actor died{where}"


# -- in actors ------------------------------------------------------------------------------------------------------


class _Desk:
    """Where actors leave word for the driver and wait for its answers; it lies on the driver's node."""

    def __init__(self) -> None:
        self._words: asyncio.Queue[tuple[int, int, str, Any]] = asyncio.Queue()
        self._answers: dict[tuple[int, int], asyncio.Future[Any]] = {}
        self._closed = False

    async def ask(self, slot: int, turn: int, wait: bool) -> Any:
        """Return a unit for an actor, or None."""
        if self._closed:
            return None
        answer = self._answers[slot, turn] = asyncio.get_running_loop().create_future()
        await self._words.put((slot, turn, "take", wait))
        return await answer

    async def say(self, slot: int, turn: int, event: Event) -> bool:
        """Take word of an event; returns whether the actor is to go on."""
        await self._words.put((slot, turn, "tell", event))
        return not self._closed

    async def give(self, slot: int, turn: int, unit: Any) -> None:
        answer = self._answers.pop((slot, turn), None)
        if answer is not None and not answer.done():
            answer.set_result(unit)

    async def words(self, timeout: float) -> list[tuple[int, int, str, Any]]:
        """Return what was said since the last call, waiting a while for the first word."""
        try:
            found = [await asyncio.wait_for(self._words.get(), timeout)]
        except TimeoutError:
            return []
        while not self._words.empty():
            found.append(self._words.get_nowait())
        return found

    async def close(self) -> None:
        """Have every actor end at its next word."""
        self._closed = True
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(None)


class _Stopped(KeyboardInterrupt):
    """The driver wants the actors to end."""


@dataclass(frozen=True)
class _AtDesk:
    ray: Any
    desk: Any
    slot: int
    turn: int

    def take(self, *, wait: bool) -> Any | None:
        return self.ray.get(self.desk.ask.remote(self.slot, self.turn, wait))

    def tell(self, event: Event) -> None:
        if not self.ray.get(self.desk.say.remote(self.slot, self.turn, event)):
            raise _Stopped


class _Actor:
    """One worker of the crew."""

    def work(self, maker: Callable[[int], UnitWorker], threads: int, desk: Any, slot: int, turn: int) -> None:
        import ray

        logging.basicConfig(level=logging.WARNING)
        try:
            serve(maker(threads), _AtDesk(ray, desk, slot, turn))
        except _Stopped:
            return
        except CacheKDError as error:
            raise type(error)(f"{error} (on node {platform.node()})") from None
