"""In: words on the command line. Out: the program: its group of commands, errors as one line, signals as an end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from cache_kd import __version__
from cache_kd.errors import LOG_FORMAT, CacheKDError


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what batch systems and containers send before they kill."""


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Have SIGTERM end what runs inside as Ctrl-C does; processes forked inside inherit that."""

    def stop(number: int, frame: FrameType | None) -> None:
        # The signal may have reached loader workers too, at whose death torch would raise in the middle of the end.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Terminated

    if os.name == "nt" or threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Group(click.Group):
    """Prints an error as one line: ours with exit code 1, bad usage with 2; `--debug` shows where ours came from."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            self._refuse_usage(ctx, error)

    def _refuse_usage(self, ctx: click.Context, error: click.UsageError) -> NoReturn:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            raise error
        command = (error.ctx or ctx).command_path
        click.echo(f"cache-kd: {' '.join(error.format_message().split())} See {command} --help", err=True)
        ctx.exit(2)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with terminated_as_interrupted():
                return super().invoke(ctx)
        except click.UsageError as error:
            self._refuse_usage(ctx, error)
        except CacheKDError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"cache-kd: {' '.join(str(error).split())}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt as interrupt:
            notes = getattr(interrupt, "__notes__", ["what is committed stays, run the same command again to go on"])
            stopped, code = ("terminated", 143) if isinstance(interrupt, Terminated) else ("interrupted", 130)
            click.echo(f"cache-kd: {stopped}; {' '.join(notes)}", err=True)
            ctx.exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cache-kd")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Knowledge distillation of YOLO detectors from a cache: run the teacher once, train many students.

    \b
    cache-kd extract --teacher best.pt
    cache-kd train --student yolov8n.yaml
    """
    # Read when torch loads its OpenMP: idle threads sleep instead of spinning. With both cores of a machine busy
    # elsewhere, a training step of YOLOv8n took 0.23 CPU seconds so and 0.95 spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, stream=sys.stderr)
