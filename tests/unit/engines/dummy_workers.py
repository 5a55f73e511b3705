"""Workers of numbers for tests of engines: attempts are files in a folder, as a store would keep them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_kd.engines.board import Advanced, Done, Failed, GivenUp, Tell
from cache_kd.errors import DiskSpaceError

ATTEMPTS = 3


@dataclass(frozen=True)
class Numbers:
    """Makes and is a worker: writes a file a number; what befalls some of them, `fates` says.

    Attributes:
        ahead: how many numbers are asked for before the first is done, as a loader does.
    """

    folder: Path
    fates: dict[int, str]
    ahead: int = 1
    wait: float = 0.0

    def __call__(self) -> Numbers:
        if self.fates.get(-1) == "die":
            os._exit(7)
        (self.folder / f"made-{os.getpid()}").touch()
        return self

    def do(self, units: Iterator[Any], tell: Tell) -> None:
        held: list[int] = []
        ended = False
        while held or not ended:
            while not ended and len(held) < self.ahead:
                unit = next(units, None)
                ended = unit is None
                if unit is not None and self._begin(unit, tell):
                    held.append(unit)
            if held:
                self._one(held.pop(0), tell)

    def _begin(self, unit: int, tell: Tell) -> bool:
        for number in range(ATTEMPTS):
            try:
                (self.folder / f"attempt-{unit}-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        tell(GivenUp(unit, "tried three times"))
        return False

    def _one(self, unit: int, tell: Tell) -> None:
        time.sleep(self.wait)
        tell(Advanced(unit, 1))
        fate = self.fates.get(unit)
        if fate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "fail":
            tell(Failed(unit, "cannot"))
            return
        if fate == "once" and not (self.folder / f"attempt-{unit}-1").exists():
            tell(Failed(unit, "not yet"))
            return
        if fate == "crash":
            raise RuntimeError("out of memory")
        if fate == "full":
            raise DiskSpaceError("the disk is full")
        tell(Advanced(unit, 1))
        (self.folder / f"done-{unit}").write_text(str(os.getpid()))
        tell(Done(unit))


@dataclass(frozen=True)
class RayNumbers(Numbers):
    """The same, told how many threads it has."""

    def __call__(self, threads: int = 1) -> Numbers:
        return super().__call__()
