"""In: commands that must fail. Out: their one line, after checking its form and that nothing was left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cache_kd.cli import main

SMALL = ["--imgsz", "64", "--batch", "4", "--views", "1", "--plain-views", "0", "--device", "cpu"]
QUICK = ["epochs=1", "batch=4", "val=False", "plots=False", "device=cpu"]
Refused = Callable[..., str]


def everything_below(*folders: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file, and every folder."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            status = path.stat()
            found[str(path)] = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
    return found


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of each test, empty."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CACHE_KD_CACHE", raising=False)
    return folder


@pytest.fixture
def refused(tmp_path: Path, few_images: Path, few_cache: Path) -> Refused:
    """Run a command that must fail; return its line, after checking that it is one and that nothing was left behind."""

    def check(*words: str | Path, code: int = 1) -> str:
        folders = (tmp_path, few_images.parent, few_cache)
        before = everything_below(*folders)
        done = run(*words)
        assert (done.exit_code, done.exception is None or isinstance(done.exception, SystemExit)) == (code, True), (
            done.output,
            done.exception,
        )
        (line,) = done.stderr.splitlines()
        assert line.startswith("cache-kd: ")
        assert everything_below(*folders) == before
        return line

    return check
