"""In: a worker of this process. Out: the units of a board, done one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from cache_kd.engines.board import Board, Event, Tell, UnitWorker, serve


@final
@dataclass(frozen=True)
class LocalEngine:
    """Does everything in this process: the engine unless another one is asked for."""

    worker: UnitWorker

    def run(self, board: Board, tell: Tell) -> None:
        serve(self.worker, _Direct(board, tell))


@dataclass(frozen=True)
class _Direct:
    board: Board
    listener: Tell

    def take(self, *, wait: bool) -> Any | None:
        return self.board.take(0)

    def tell(self, event: Event) -> None:
        self.board.tell(0, event)
        self.listener(event)
