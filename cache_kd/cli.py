"""In: words on the command line. Out: calls of the pipeline, and lines for people or one JSON document for programs."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from cache_kd import __version__
from cache_kd.errors import CacheKDError

PATH = click.Path(path_type=Path)


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
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


EXTRACT_OPTIONS = (
    click.option("--teacher", required=True, type=PATH, help="Ultralytics detection checkpoint."),
    click.option("--data", type=PATH, help="Data file; default: the one that the checkpoint recorded."),
    click.option("--cache", type=PATH, help="Folder of the cache; default: kd_cache/<data>-<teacher>-<identity>."),
    click.option("--views", default=8, show_default=True, help="Mixed views of every image (mosaic and all)."),
    click.option("--plain-views", default=1, show_default=True, help="Plain views, for the epochs of close_mosaic."),
    click.option("--imgsz", type=int, help="Side of the views in pixels; default: the checkpoint's."),
    click.option("--batch", default=16, show_default=True, help="Views a forward pass."),
    click.option("--device", help="cpu, 0, cuda:1, …; default: the first GPU, else the CPU."),
    click.option("--workers", type=int, help="Processes that make views; default: 0 on a CPU, else up to 8."),
    click.option("--seed", default=0, show_default=True, help="Seed of the views."),
    click.option(
        "--store", default="features,logits", show_default=True, help="Targets to keep; also vlr, for ld:vlr=…."
    ),
    click.option(
        "--taps", default="", metavar="NAMES", help="More layers to keep: C3,C4,C5 of the backbone, or numbers."
    ),
    click.option("--pack", default="none", show_default=True, help="Keep the views too: none, jpeg[:quality] or png."),
    click.option("--fidelity", help="exact, safe, default, small or tiny; default: default, or what --budget allows."),
    click.option("--budget", metavar="SIZE", help="Fit into 40GB, 500MB, …: picks fidelity and views, up to --views."),
    click.option("--precision", default="fp32", show_default=True, help="Of the teacher: fp32 or fp16."),
    click.option("--trust-teacher", is_flag=True, help="Let the checkpoint run code while it loads."),
    click.option("--import", "imports", multiple=True, type=PATH, help="Your own Python file with model classes."),
    click.option("--allow-download", is_flag=True, help="Follow the data file's download: entry."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."),
    click.argument("augmentation", nargs=-1, metavar="[KEY=VALUE]..."),
)


def extract_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of an extraction."""
    for option in reversed(EXTRACT_OPTIONS):
        command = option(command)
    return command


def extract_settings(options: dict[str, Any]) -> Any:
    """Return the `ExtractSettings` that the words of `extract_options` say."""
    from cache_kd.config import parse_pairs
    from cache_kd.pipeline.extract_settings import ExtractSettings
    from cache_kd.pipeline.sizes import parse_size

    augment, budget = parse_pairs(options.pop("augmentation")), options.pop("budget")
    stores, layers = (names_in(options.pop(name)) for name in ("store", "taps"))
    size = parse_size(budget, "--budget") if budget is not None else None
    return ExtractSettings(store=stores, taps=layers, augment=augment, budget=size, **options)


def names_in(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    return tuple(part for part in text.split(",") if part)


@main.command()
@extract_options
def extract(as_json: bool, **options: Any) -> None:
    """Run the teacher once over every view of the data set and store what it says.

    Data set, image size and augmentation are those that the teacher's checkpoint recorded; KEY=VALUE overrides single
    augmentation settings. The same command goes on after an interruption; with more --views it adds the new ones.

    \b
    cache-kd extract --teacher best.pt
    cache-kd extract --teacher best.pt --views 16 --fidelity small mixup=0.1
    """
    with _quiet(as_json):
        from cache_kd.pipeline.extraction import extract as run

        done = run(
            extract_settings(options),
            say=lambda line: click.echo(line, err=as_json),
            progress=None if as_json else Progress("views"),
        )
    _say_made(done, as_json)
    if not as_json:
        click.echo("train a student from it: cache-kd train --student yolov8n.yaml")


def _say_made(done: Any, as_json: bool) -> None:
    """Print what a finished extraction or recoding left."""
    from cache_kd.pipeline.sizes import megabytes

    views, images = [view.name for view in done.manifest.views], done.manifest.num_images
    summary = {
        "cache": str(done.path),
        "digest": done.manifest.digest,
        "views": views,
        "images": images,
        "items_extracted": done.items,
        "bytes": done.num_bytes,
        "seconds": round(done.seconds, 2),
    }
    if as_json:
        click.echo(json.dumps(summary))
        return
    each = done.num_bytes / (images * len(views)) / 1e3
    click.echo(
        f"{done.path}: {len(views)} views of {images} images, {megabytes(done.num_bytes)} ({each:.1f} kB a view), "
        f"digest {done.manifest.digest[:16]}"
    )


@main.command()
@extract_options
def estimate(as_json: bool, **options: Any) -> None:
    """Say what an extraction would cost before anything is written: bytes, time, read rate, break-even.

    Takes the options of extract, looks at a sample of the views, and shows the neighbouring fidelities and half and
    double the number of views beside the one asked about.

    \b
    cache-kd estimate --teacher best.pt
    cache-kd estimate --teacher best.pt --views 16 --budget 40GB
    """
    with _quiet(as_json):
        from cache_kd.pipeline.estimate import estimate as run

        found = run(extract_settings(options), say=lambda line: click.echo(line, err=as_json))
    click.echo(json.dumps(found.to_json()) if as_json else "\n".join(found.lines()))


@main.command()
@click.option("--student", help="Model YAML or checkpoint, as yolov8n.yaml.")
@click.option("--cache", type=PATH, help="Folder of a cache; default: the newest complete one in kd_cache/.")
@click.option("--data", type=PATH, help="Data file; default: the one that the extraction used.")
@click.option("--loss", "losses", multiple=True, metavar="SPEC", help="NAME[:key=value,…], repeatable, or none.")
@click.option("--balance", type=float, metavar="SHARE", help="Hold each term at this share of the neck's gradient.")
@click.option("--name", help="Name of the run's folder under runs/detect.")
@click.option("--verify-pixels", default="first", show_default=True, help="first, all or off.")
@click.option("--threads", type=click.IntRange(1, 1024), help="torch threads; default: Ultralytics' choice, cores - 1.")
@click.option("--trust-student", is_flag=True, help="Let the student's file run code while it loads.")
@click.option("--import", "imports", multiple=True, type=PATH, help="Your own Python file with model classes.")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def train(settings: tuple[str, ...], student: str | None, **options: Any) -> None:
    """Train a student on stored targets, in Ultralytics' own trainer. The teacher is never loaded.

    KEY=VALUE are Ultralytics' own settings. --loss none trains plainly on the same views: the baseline.

    \b
    cache-kd train --student yolov8n.yaml
    cache-kd train --student yolov8n.yaml --loss cwd --loss ld:weight=2 epochs=50 batch=32
    cache-kd train resume=runs/detect/train/weights/last.pt
    """
    from cache_kd.config import parse_pairs

    pairs = parse_pairs(settings)
    if student is None and not pairs.get("resume"):
        raise click.UsageError("Missing option '--student', for example --student yolov8n.yaml.")
    from cache_kd.pipeline.training import TrainSettings
    from cache_kd.pipeline.training import train as run

    done = run(TrainSettings(student=student or "", settings=pairs, **options), say=click.echo)
    click.echo(f"run: {done.folder}")


@main.command()
@click.argument("cache", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def inspect(cache: Path, as_json: bool) -> None:
    """Say what a cache holds and what it was made from.

    \b
    cache-kd inspect kd_cache/bccd-best-1a2b3c4d
    """
    with _quiet(as_json):
        from cache_kd.pipeline.inspection import describe, lines

        facts = describe(cache)
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))


@main.command()
@click.argument("cache", type=PATH)
@click.option("--pixels", is_flag=True, help="Make every view again and compare its pixels' hash.")
@click.option("--teacher", type=PATH, help="Run this teacher on a sample and compare its targets.")
@click.option("--data", type=PATH, help="Data file; default: the one that the extraction used.")
@click.option("--sample", default=32, show_default=True, help="Items to run the teacher on.")
@click.option("--trust-teacher", is_flag=True, help="Let the checkpoint run code while it loads.")
@click.option("--repair", is_flag=True, help="Put back what is damaged; targets need --teacher, which extracts them.")
@click.option("--jobs", type=click.IntRange(1), help="Threads that read and hash; default: the cores, at most 8.")
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Read this share of files.")
@click.option("--seed", default=0, show_default=True, help="Which files --fraction takes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def verify(cache: Path, as_json: bool, repair: bool, jobs: int | None, **options: Any) -> None:
    """Check a cache: manifest, sizes, sha256 and crc32c of everything; on request pixels and targets too.

    \b
    cache-kd verify kd_cache/bccd-best-1a2b3c4d
    cache-kd verify kd_cache/bccd-best-1a2b3c4d --pixels --teacher best.pt
    cache-kd verify kd_cache/bccd-best-1a2b3c4d --repair --teacher best.pt
    """
    if repair and (options["pixels"] or options["fraction"] < 1):
        raise click.UsageError("--repair reads every file and no pixels; leave --pixels and --fraction out.")
    with _quiet(as_json):
        from cache_kd.pipeline.repair import repair as mend
        from cache_kd.pipeline.verification import verify as check
        from cache_kd.pipeline.versions import cpu_threads

        if repair:
            options = {name: options[name] for name in ("teacher", "data", "trust_teacher")}
        run: Any = mend if repair else check
        report = run(
            cache,
            jobs=jobs or min(8, cpu_threads()),
            say=lambda line: click.echo(line, err=as_json),
            progress=None if as_json else Progress("checks"),
            **options,
        )
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        click.echo("\n".join(report.lines()))
    if not report.ok:
        raise SystemExit(1)


@main.command()
@click.argument("cache", type=PATH)
@click.option("--fidelity", help="Coarser than the cache's; default: the same, for fewer --store.")
@click.option("--store", help="Targets to keep, some of the cache's; default: all of them.")
@click.option("--cache", "out", type=PATH, help="Folder of the new cache; default: beside the others in kd_cache/.")
@click.option("--data", type=PATH, help="Data file; only a replayed cache of fidelity exact needs it, for its labels.")
@click.option("--jobs", type=click.IntRange(1), help="Threads; default: the cores, at most 8.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def recode(cache: Path, store: str | None, out: Path | None, jobs: int | None, as_json: bool, **options: Any) -> None:
    """Make a smaller cache of the same views from a finer one, without the teacher. Goes on after an interruption.

    \b
    cache-kd recode kd_cache/bccd-best-1a2b3c4d --fidelity small
    cache-kd recode kd_cache/bccd-best-1a2b3c4d --store logits
    """
    with _quiet(as_json):
        from cache_kd.pipeline.recoding import RecodeSettings
        from cache_kd.pipeline.recoding import recode as run
        from cache_kd.pipeline.versions import cpu_threads

        stores = names_in(store) if store is not None else None
        done = run(
            RecodeSettings(cache, store=stores, cache=out, jobs=jobs or min(8, cpu_threads()), **options),
            say=lambda line: click.echo(line, err=as_json),
            progress=None if as_json else Progress("views"),
        )
    _say_made(done, as_json)


@main.command(name="list")
@click.argument("folder", type=PATH, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def list_(folder: Path | None, as_json: bool) -> None:
    """List the caches in a folder, by default kd_cache/ or CACHE_KD_CACHE: size, age, last use, what they hold.

    \b
    cache-kd list
    """
    from cache_kd.pipeline.caches import list_caches, table, to_json

    found = list_caches(folder)
    click.echo(json.dumps(to_json(found)) if as_json else table(found, folder))


@main.command()
@click.argument("caches", type=PATH, nargs=-1, metavar="CACHE...")
@click.option("--unfinished", is_flag=True, help="Delete all unfinished caches of the default place.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def rm(caches: tuple[Path, ...], unfinished: bool, yes: bool, as_json: bool) -> None:
    """Delete caches, and nothing that is no cache or is being written. Asks first on a terminal.

    \b
    cache-kd rm kd_cache/bccd-best-1a2b3c4d
    cache-kd rm --unfinished --yes
    """
    from cache_kd.pipeline.caches import remove
    from cache_kd.pipeline.sizes import megabytes

    def agreed(what: str) -> bool:
        return yes or not sys.stdin.isatty() or click.confirm(f"{what}?", err=as_json)

    gone = remove(caches, unfinished=unfinished, agreed=agreed, say=lambda line: click.echo(line, err=as_json))
    if as_json:
        click.echo(json.dumps([{"cache": str(path), "bytes": size} for path, size in gone]))
        return
    for path, size in gone:
        left = "; files that are not the cache's are still there" if path.exists() else ""
        click.echo(f"{path}: deleted, {megabytes(size)} freed{left}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def losses(as_json: bool) -> None:
    """List the distillation losses: what they transfer, need and cost, and their options.

    \b
    cache-kd losses
    """
    from cache_kd.losses.catalogue import catalogue, table

    click.echo(json.dumps(catalogue()) if as_json else table())


@main.command()
@click.option("--out", type=PATH, default=Path("runs/demo"), show_default=True, help="Folder for everything it makes.")
@click.option("--seed", default=0, show_default=True, help="Seed of the drawn data set and of every training.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Tell the whole story on a drawn data set: teacher, one cache, a plain student and two distilled ones.

    \b
    cache-kd demo
    """
    with _quiet(as_json):
        from cache_kd.demo.story import tell

        result = tell(out, seed=seed, say=lambda line: click.echo(line, err=as_json))
    click.echo(json.dumps(result.to_json()) if as_json else result.table())


class Progress:
    """Shows (done, total) as a bar on a terminal, as plain lines with rate and ETA elsewhere."""

    def __init__(self, unit: str) -> None:
        self.unit, self.started, self._last = unit, time.monotonic(), 0.0
        self._bar: Any = None
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
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


class _quiet:
    """Sends whatever libraries print to stderr, so that stdout holds one JSON document."""

    def __init__(self, active: bool) -> None:
        self.active, self._stdout = active, sys.stdout

    def __enter__(self) -> None:
        if self.active:
            sys.stdout = sys.stderr

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stdout
