"""In: what a command reports. Out: a bar or lines of progress for people, one JSON document alone for programs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


class CachePlace(click.ParamType[Any, Any]):
    """A cache's folder, or its URL in an object store."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        from cache_kd.cache.places import parse_place
        from cache_kd.errors import SettingError

        try:
            return parse_place(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)


CACHE = CachePlace()


class Progress:
    """Shows (done, total) as a bar on a terminal, as plain lines with rate and ETA elsewhere.

    Args:
        unit: what is shown, as "views". each: how many of what is counted make one of it.
    """

    def __init__(self, unit: str, *, each: int = 1) -> None:
        self.unit, self.each, self.started, self._last = unit, each, time.monotonic(), 0.0
        self._bar: Any = None
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        whole = -(-total // self.each)
        done, total = whole if done >= total else done // self.each, whole
        if sys.stdout.isatty():
            if self._bar is None:
                self._bar = click.progressbar(length=total, show_pos=True, show_eta=True, label=self.unit)
                self._bar.__enter__()
            self._bar.update(done - self._shown)
            self._shown = done
            if done >= total:
                self._bar.__exit__(None, None, None)
                self._bar, self._shown = None, 0
                click.echo()
            return
        elapsed = time.monotonic() - self.started
        if done < total and elapsed - self._last < 5:
            return
        self._last = elapsed
        rate = done / elapsed if elapsed else 0.0
        left = (total - done) / rate if rate else 0.0
        click.echo(f"{done}/{total} {self.unit}, {rate:.1f}/s, {left:.0f} s left")


class quiet:
    """Sends whatever libraries print to stderr, so that stdout holds one JSON document."""

    def __init__(self, active: bool) -> None:
        self.active, self._stdout = active, sys.stdout

    def __enter__(self) -> None:
        if self.active:
            sys.stdout = sys.stderr

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stdout
