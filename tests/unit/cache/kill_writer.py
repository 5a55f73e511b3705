"""In: a folder. Out: of a writer killed at each of its system calls in turn, the digests after going on. A script."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from cache_cases import MIXED, SMALL, write_views

from cache_kd.cache import layout, verify_cache

CALLS = ("fsync", "replace", "link", "unlink", "mkdir")


def die_at(moment: int) -> None:
    """Make this process kill itself as it enters the system call number `moment`."""
    left = [moment]
    sync = os.fsync

    def hooked(call: Any) -> Any:
        def hook(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                if call is sync and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)  # died in the middle of writing
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return hook

    for name in CALLS:
        setattr(os, name, hooked(getattr(os, name)))


def content(path: Path) -> dict[str, bytes]:
    """Return all files below `path`: digests come from what was in memory, these from the disk."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def main(folder: Path) -> None:
    layout.MAX_SAMPLES = 4
    # A kill loses nothing that was written, synced or not; without syncing a hundred trials take seconds.
    os.fsync = lambda _: None
    digests = [write_views(folder / "whole", MIXED, columns=SMALL[2:3]).digest]
    whole = content(folder / "whole")
    moment = 0
    while True:
        path = folder / f"killed-{moment}"
        child = os.fork()
        if child == 0:
            die_at(moment)
            write_views(path, MIXED, columns=SMALL[2:3])
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        if (path / "manifest.json").exists():
            assert verify_cache(path).ok, f"complete but unsound after a kill at call {moment}"
        digests.append(write_views(path, MIXED, columns=SMALL[2:3]).digest)
        assert content(path) == whole, f"other files after a kill at call {moment}"
        moment += 1
    sys.stdout.write(" ".join([str(moment), *digests]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
