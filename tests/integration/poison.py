"""Modules for --import that make one unit of a small cache go wrong, in whatever process makes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_kd.teacher import extract

# Imported where the worker is, before it makes anything. `shard.MAX`: several units a view of few images.
TEMPLATE = """
import os, signal, time
from cache_kd.teacher import extract

before = extract.encode_views
TRIED = {folder!r}

def encode_views(views, teacher, codec, *, batch, place):
    name = place(0).split(",")[0].removeprefix("view ")
    open(os.path.join(TRIED, f"{{name}}-{{os.getpid()}}-{{time.monotonic_ns()}}"), "w").close()
    if name == {view!r}:
        {what}
    return before(views, teacher, codec, batch=batch, place=place)

extract.encode_views = encode_views
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
CRASH = "raise RuntimeError('CUDA out of memory')"
ALARM = "raise extract.AlarmError('features of P3: 2 of 8 values are not finite')"
WAIT = "time.sleep(60)"
KILL_ONCE = f"len([n for n in os.listdir(TRIED) if n.startswith(name)]) < 2 and {KILL}"


def poison(folder: Path, view: str, what: str) -> Path:
    """Write a module that does `what` at every batch of `view`, and notes every batch in `folder`/tried."""
    (folder / "tried").mkdir(exist_ok=True)
    file = folder / "poison_module.py"
    file.write_text(TEMPLATE.format(folder=str(folder / "tried"), view=view, what=what))
    return file


def tried(folder: Path) -> dict[str, int]:
    """Return how many batches of each view were begun."""
    found: dict[str, int] = {}
    for name in sorted(path.name.rsplit("-", 2)[0] for path in (folder / "tried").iterdir()):
        found[name] = found.get(name, 0) + 1
    return found


@pytest.fixture(autouse=True)
def healed() -> Iterator[None]:
    """Take the poison out of this process again, which imports the module too."""
    before = extract.encode_views
    yield
    extract.encode_views = before


def heal() -> None:
    """The same at once, for what follows in the same test."""
    extract.encode_views = HEALTHY


HEALTHY = extract.encode_views
