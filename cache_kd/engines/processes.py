"""In: what makes a worker, once a process. Out: the units of a board, done by processes of this machine."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn, final

from cache_kd.engines.board import Board, Event, Tell, UnitWorker, serve
from cache_kd.errors import CacheKDError

Maker = Callable[[], UnitWorker]
GRACE = 5.0
"""Seconds that processes have to end when they are told to."""
_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class ProcessesEngine:
    """Spawns one process a maker; one that dies is replaced, and another one takes what it held.

    Processes are spawned, not forked: threads and CUDA do not survive a fork. They leave Ctrl-C to this process, which
    ends them; should it be killed itself, they end at their next word to it.
    """

    makers: Sequence[Maker]

    def run(self, board: Board, tell: Tell) -> None:
        with _crew(self.makers[: max(1, board.open)]) as crew:
            while not (board.finished or board.hopeless):
                for member in crew:
                    member.give(board)
                alive = [member for member in crew if not member.gone]
                ready = wait([handle for member in alive for handle in (member.pipe, member.process.sentinel)])
                for member in alive:
                    if member.pipe in ready or member.process.sentinel in ready:
                        member.listen(board, tell)
                _replace_dead(crew, board)


def _replace_dead(crew: Sequence[_Member], board: Board) -> None:
    """Start those again that ended, as long as there is work that nobody has."""
    for member in crew:
        if member.gone and board.open and not board.tired(member.number):
            member.start()
    if all(member.gone for member in crew) and not board.finished:
        board.abandon(crew[0].last_word)


@dataclass
class _Member:
    """One process of the crew and this end of its pipe."""

    number: int
    maker: Maker
    waiting: bool = False
    gone: bool = False
    last_word: str = ""
    process: BaseProcess = field(init=False)
    pipe: Connection = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        spawning = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=_main, args=(self.maker, theirs), name=f"cache-kd-{self.number}")
        self.waiting, self.gone, self.last_word = False, False, ""
        # Ctrl-C reaches every process of a terminal: held back here, it is held back in the new one for good.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def give(self, board: Board) -> None:
        """Give a waiting process its next unit if there is one."""
        if self.waiting and (unit := board.take(self.number)) is not None:
            self._send(unit)

    def listen(self, board: Board, tell: Tell) -> None:
        """Hear what the process has to say, to the last word if it ended."""
        while self.pipe.poll():
            try:
                word = self.pipe.recv()
            except (EOFError, OSError):
                self._bury(board, tell)
                return
            self._hear(word, board, tell)

    def _hear(self, word: tuple[str, Any], board: Board, tell: Tell) -> None:
        kind, content = word
        if kind == "tell":
            board.tell(self.number, content)
            tell(content)
        elif kind == "raise":
            raise content
        elif kind == "end":
            self.last_word = content
        else:
            unit = board.take(self.number)
            if unit is None and content:
                self.waiting = True
            else:
                self._send(unit)

    def _send(self, unit: Any) -> None:
        self.waiting = False
        with contextlib.suppress(OSError):  # it died; the end of its pipe says so in a moment
            self.pipe.send(unit)

    def _bury(self, board: Board, tell: Tell) -> None:
        self.process.join()
        self.gone = True
        self.last_word = self.last_word or _how(self.process.exitcode)
        _log.warning("worker %d is gone: %s", self.number, self.last_word)
        for event in board.lose(self.number, self.last_word):
            tell(event)


@contextlib.contextmanager
def _crew(makers: Sequence[Maker]) -> Iterator[list[_Member]]:
    """Start the processes; whatever happens, none is left behind."""
    crew: list[_Member] = []
    try:
        for number, maker in enumerate(makers):
            crew.append(_Member(number, maker))
        yield crew
        for member in crew:
            member.pipe.close()  # which ends a process that waits for a unit
        _join(crew, time.monotonic() + GRACE)
    finally:
        for member in crew:
            member.process.terminate()
        _join(crew, time.monotonic() + GRACE)
        for member in crew:
            member.process.kill()
            member.process.join()
            member.pipe.close()


def _join(crew: Sequence[_Member], deadline: float) -> None:
    for member in crew:
        member.process.join(max(0.0, deadline - time.monotonic()))


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


# -- in the process -------------------------------------------------------------------------------------------------


class _Stopped(KeyboardInterrupt):
    """This process is told to end."""


@dataclass(frozen=True)
class _Pipe:
    pipe: Connection

    def take(self, *, wait: bool) -> Any | None:
        self.pipe.send(("take", wait))
        return self.pipe.recv()

    def tell(self, event: Event) -> None:
        self.pipe.send(("tell", event))


def _main(maker: Maker, pipe: Connection) -> None:
    signal.signal(signal.SIGTERM, _stop)
    sys.stdout = sys.stderr  # the driver's may hold one JSON document
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        serve(maker(), _Pipe(pipe))
    except (_Stopped, EOFError, BrokenPipeError, ConnectionResetError):  # told to end, or the driver is gone
        return
    except CacheKDError as error:
        pipe.send(("raise", error))
    except Exception as error:  # whatever it is ends this process alone, and the driver learns of it
        _log.exception("a worker ends")
        pipe.send(("end", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]))
        raise SystemExit(1) from error


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise at the death of loaders that the signal reached
    raise _Stopped
