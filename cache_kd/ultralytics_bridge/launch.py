"""In: a trainer that is to run on several devices. Out: Ultralytics' own launch of it, and what every process says.

Ultralytics writes a small program and a pickle of the trainer's class, and has torchrun start one process a device,
which builds the trainer again. What a process of ours builds is a `RankRun`, which is told all that it needs; how it
ended, it writes into a folder that lives as long as the launch.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

from ultralytics.utils import RANK
from ultralytics.utils.dist import ddp_cleanup, generate_ddp_command

from cache_kd import errors
from cache_kd.errors import LOG_FORMAT, CacheKDError, SettingError
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

LOG = logging.getLogger(__name__)
GRACE = 40.0
"""Seconds in which torchrun, told to stop, ends its processes: it gives them 30 before it kills them."""
_DIED = re.compile(r"exitcode: (-?\d+)\) local_rank: (\d+)")


class Work(Protocol):
    """What each process does: given Ultralytics' settings, it trains and returns what JSON can hold."""

    def __call__(self, cfg: Any, overrides: dict[str, Any], callbacks: Any) -> Mapping[str, Any]: ...


class RankRun:
    """One process's part of a run, as Ultralytics' launch file makes it: built of three values, then trained.

    `launch` derives a class for each run, which its file carries by value with the two attributes.

    Attributes:
        work: what the process does. folder: where it says how it ended.
        model: Ultralytics sets it; the settings name the student, too.
    """

    work: ClassVar[Work]
    folder: ClassVar[Path]
    model: Any = None

    def __init__(self, cfg: Any, overrides: dict[str, Any], _callbacks: Any = None) -> None:
        self._given = (cfg, overrides, _callbacks)

    def train(self) -> None:
        """Do the work; an error of ours ends the process without a word, which is the launching process's to say."""
        logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, stream=sys.stderr)
        if RANK > 0:  # Ultralytics' rule: the first process speaks for all
            logging.getLogger("cache_kd").setLevel(logging.ERROR)
        try:
            done = dict(self.work(*self._given))
        except CacheKDError as error:
            said = {"kind": type(error).__name__, "line": str(error), "trace": traceback.format_exc()}
            self._leave("failed", {**said, "at": time.time()})
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        self._leave("done", done)

    def _leave(self, how: str, content: Mapping[str, Any]) -> None:
        waiting = self.folder / f"{how}-{RANK}.part"
        waiting.write_text(json.dumps(content), encoding="utf-8")
        waiting.rename(waiting.with_suffix(".json"))


def check_shared_batch(batch: object, devices: int) -> None:
    """Raise `SettingError` unless a batch can be dealt out to so many devices in equal parts."""
    if isinstance(batch, int) and batch > 0 and batch % devices == 0:
        return
    near = max(int(batch) // devices, 1) * devices if isinstance(batch, int | float) and batch >= 1 else 8 * devices
    raise SettingError(
        f"batch={batch} cannot be dealt out to {devices} devices; allowed: a multiple of {devices}, as batch={near}"
    )


def launch(trainer: DistillTrainer, work: Work) -> list[Mapping[str, Any]]:
    """Run `work` in one process a device of `trainer` and return what each left, by rank.

    Raises:
        CacheKDError: The first error of ours that a process met, as it was raised there; or one that says which
            process ended otherwise, whose own words stand on stderr.
    """
    check_shared_batch(trainer.args.batch, trainer.world_size)
    with tempfile.TemporaryDirectory(prefix="cache-kd-ranks-") as name:
        folder = Path(name)
        run = _stand_in(trainer, work, folder)
        command, file = _command(run)
        try:
            code, said = _watched(command, folder)
        finally:
            ddp_cleanup(run, file)
        done = [folder / f"done-{rank}.json" for rank in range(trainer.world_size)]
        if code or not all(path.exists() for path in done):
            raise _failure(folder, trainer, code, said)
        return [json.loads(path.read_text(encoding="utf-8")) for path in done]


def _stand_in(trainer: DistillTrainer, work: Work, folder: Path) -> Any:
    """Return an object that Ultralytics' launch takes for the trainer: it reads these attributes, and the class."""
    kind = type("RankRun", (RankRun,), {"work": staticmethod(work), "folder": folder})
    run: Any = kind({}, {}, None)
    run.args, run.model, run.callbacks = trainer.args, trainer.model, trainer.callbacks
    run.save_dir, run.world_size = trainer.save_dir, trainer.world_size
    # It deletes the folder of a run that is not resumed, which with exist_ok may hold the user's files.
    run.resume = trainer.resume or trainer.args.exist_ok
    return run


def _command(run: Any) -> tuple[list[str], str]:
    try:
        command, file = generate_ddp_command(run)
    except ImportError as error:
        raise SettingError(
            f"a run on several devices needs cloudpickle ({error}); run: pip install 'cloudpickle>=3.1.1'"
        ) from error
    return command, str(file)


def _watched(command: list[str], folder: Path) -> tuple[int, str]:
    """Run torchrun to its end; return its exit code and the end of what it wrote to stderr, which is passed on."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="backslashreplace")
    said: deque[str] = deque(maxlen=200)
    quiet = threading.Event()
    relay = threading.Thread(target=_relay, args=(process.stderr, folder, said, quiet), daemon=True)
    relay.start()
    try:
        code = process.wait()
    finally:  # interrupted or terminated: none of its processes may go on alone
        quiet.set()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        relay.join(5.0)
    return code, "".join(said)


def _relay(stream: IO[str], folder: Path, said: deque[str], quiet: threading.Event) -> None:
    """Pass lines on until a process has failed in words of ours: torchrun and the other processes then add many."""
    with stream:
        for line in stream:
            said.append(line)
            if not quiet.is_set() and not any(folder.glob("failed-*.json")):
                sys.stderr.write(line)


def _failure(folder: Path, trainer: DistillTrainer, code: int, said: str) -> CacheKDError:
    failed = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("failed-*.json")]
    if failed:
        first = min(failed, key=lambda found: float(found["at"]))
        kind = getattr(errors, first["kind"], CacheKDError)
        error: CacheKDError = kind(first["line"])
        error.add_note(first["trace"])
        return error
    died = _DIED.search(said)
    devices = str(trainer.args.device).split(",")
    who = f"the process of device {devices[int(died[2])]}" if died and int(died[2]) < len(devices) else "a process"
    how = _ending(int(died[1]) if died else code)
    again = f"cache-kd train resume={trainer.last}" if trainer.last.exists() else "run the same command again"
    return CacheKDError(f"{who}, one of {trainer.world_size}, {how}; what it said stands above; to go on: {again}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (", as a machine does that is out of memory" if name == "SIGKILL" else "")
