"""In: one run as a line on standard input. Out: that run, done in this process, which ends when its parent does.

python -m cache_kd.pipeline.recipes.worker, started by `execution.Worker`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from pathlib import Path

from cache_kd.errors import CacheKDError
from cache_kd.pipeline.recipes.plan import ERROR, RunTask
from cache_kd.pipeline.recipes.single_run import carry_out


def main() -> int:
    """Do the run; its folder says in `error.txt` why not, in one line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    task = RunTask.from_json(_first_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        carry_out(task)
    except CacheKDError as error:
        text = str(error)
    except Exception as error:  # whatever a run ends with must not end the others; the log has the rest
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
    else:
        return 0
    (Path(task.folder) / ERROR).write_text(" ".join(text.split()) + "\n", encoding="utf-8")
    return 1


def _first_line() -> str:
    # Not through sys.stdin: its lock, held by a waiting thread, would break the interpreter's end.
    text = b""
    while not text.endswith(b"\n") and (more := os.read(0, 1 << 16)):
        text += more
    return text.decode()


def _end_with_parent() -> None:
    """End this process as soon as the parent's end of the pipe is closed, however the parent ended."""
    while os.read(0, 1 << 16):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
