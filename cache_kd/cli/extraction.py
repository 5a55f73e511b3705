"""In: options of commands that make caches. Out: `extract`, `estimate` and `recode`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click

from cache_kd.cli.group import main
from cache_kd.cli.output import CACHE, PATH, Progress, quiet

EXTRACT_OPTIONS = (
    click.option("--teacher", required=True, type=PATH, help="Ultralytics detection checkpoint."),
    click.option("--data", type=PATH, help="Data file; default: the one that the checkpoint recorded."),
    click.option("--cache", type=CACHE, help="Folder or s3://… of it; default: kd_cache/<data>-<teacher>-<identity>."),
    click.option("--views", default=8, show_default=True, help="Mixed views of every image (mosaic and all)."),
    click.option("--plain-views", default=1, show_default=True, help="Plain views, for the epochs of close_mosaic."),
    click.option("--imgsz", type=int, help="Side of the views in pixels; default: the checkpoint's."),
    click.option("--batch", default=16, show_default=True, help="Views a forward pass."),
    click.option("--device", help="cpu, 0, cuda:1, … or several: 0,1,2,3; default: the first GPU, else the CPU."),
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


ENGINE_OPTIONS = (
    click.option("--part", metavar="I/N", help="Make part I of N only; default: all, or what Slurm's array says."),
    click.option("--processes", type=int, help="Processes that make units; default: one a device."),
    click.option("--threads", type=int, help="CPU threads of each; default: the cores, shared out."),
    click.option("--engine", default="local", show_default=True, help="local: this machine; ray: a Ray cluster."),
    click.option("--address", help="Of the Ray cluster: auto, or host:port; default: RAY_ADDRESS, or a new one here."),
    click.option("--retry", is_flag=True, help="Try units again that failed three times."),
)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say who does the work."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


def extract_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of an extraction."""
    for option in reversed(EXTRACT_OPTIONS):
        command = option(command)
    return command


def extract_settings(options: dict[str, Any]) -> Any:
    """Return the `ExtractSettings` that the words of `extract_options` say."""
    from cache_kd.config import parse_pairs, parse_size
    from cache_kd.pipeline.extract_settings import ExtractSettings

    augment, budget = parse_pairs(options.pop("augmentation")), options.pop("budget")
    stores, layers = (names_in(options.pop(name)) for name in ("store", "taps"))
    size = parse_size(budget, "--budget") if budget is not None else None
    return ExtractSettings(store=stores, taps=layers, augment=augment, budget=size, **options)


def names_in(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    return tuple(part for part in text.split(",") if part)


def part_of(words: str | None, engine: str, say: Callable[[str], None]) -> Any:
    """Return the `Part` that --part or, without it, Slurm's array names; None for all units."""
    from cache_kd.pipeline.parts import Part, slurm_part

    if words is not None:
        return Part.parse(words)
    if engine != "ray" and (found := slurm_part(os.environ)):
        say(found[1])
        return found[0]
    return None


@main.command()
@engine_options
@extract_options
def extract(as_json: bool, **options: Any) -> None:
    """Run the teacher once over every view of the data set and store what it says.

    Data set, image size and augmentation are those that the teacher's checkpoint recorded; KEY=VALUE overrides single
    augmentation settings. The same command goes on after an interruption; with more --views it adds the new ones.
    --part, --processes and --engine share the work: docs/cluster.md.

    \b
    cache-kd extract --teacher best.pt
    cache-kd extract --teacher best.pt --views 16 --fidelity small mixup=0.1
    """
    with quiet(as_json):
        from cache_kd.pipeline.extraction import extract as run

        def say(line: str) -> None:
            click.echo(line, err=as_json)

        part = part_of(options.pop("part"), options["engine"], say)
        settings = extract_settings({**options, "part": part})
        done = run(settings, say=say, progress=None if as_json else Progress("views"))
    say_made(done, as_json)
    if done.manifest is not None and not as_json:
        click.echo("train a student from it: cache-kd train --student yolov8n.yaml")


def say_made(done: Any, as_json: bool) -> None:
    """Print what a finished extraction or recoding left."""
    from cache_kd.pipeline.sizes import megabytes

    if done.manifest is None:
        left = {"cache": str(done.path), "complete": False, "units_missing": done.missing}
        left |= {"items_extracted": done.items, "seconds": round(done.seconds, 2)}
        last = f"the last part to end completes the cache; or, when all have ended: cache-kd finish {done.path}"
        click.echo(json.dumps(left) if as_json else last)
        return
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
@click.argument("cache", type=CACHE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def finish(cache: Any, as_json: bool) -> None:
    """Complete a cache of which all parts are extracted; says what is missing otherwise. Needs no teacher.

    The last part that ends does this itself; here it can be done again, or after parts that were killed at their end.

    \b
    cache-kd finish kd_cache/bccd-best-1a2b3c4d
    """
    with quiet(as_json):
        from cache_kd.pipeline.finishing import finish as run

        done = run(cache, say=lambda line: click.echo(line, err=as_json))
    say_made(done, as_json)


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
    with quiet(as_json):
        from cache_kd.pipeline.estimate import estimate as run

        found = run(extract_settings(options), say=lambda line: click.echo(line, err=as_json))
    click.echo(json.dumps(found.to_json()) if as_json else "\n".join(found.lines()))


@main.command()
@click.argument("cache", type=CACHE)
@click.option("--fidelity", help="Coarser than the cache's; default: the same, for fewer --store.")
@click.option("--store", help="Targets to keep, some of the cache's; default: all of them.")
@click.option("--cache", "out", type=CACHE, help="Folder of the new cache; default: beside the others in kd_cache/.")
@click.option("--data", type=PATH, help="Data file; needed for labels where fewer logits are kept of a replayed cache.")
@click.option("--jobs", type=click.IntRange(1), help="Threads; default: the cores, at most 8.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def recode(cache: Any, store: str | None, out: Any, jobs: int | None, as_json: bool, **options: Any) -> None:
    """Make a smaller cache of the same views from a finer one, without the teacher. Goes on after an interruption.

    \b
    cache-kd recode kd_cache/bccd-best-1a2b3c4d --fidelity small
    cache-kd recode kd_cache/bccd-best-1a2b3c4d --store logits
    """
    with quiet(as_json):
        from cache_kd.pipeline.recoding import RecodeSettings
        from cache_kd.pipeline.recoding import recode as run
        from cache_kd.pipeline.versions import cpu_threads

        stores = names_in(store) if store is not None else None
        done = run(
            RecodeSettings(cache, store=stores, cache=out, jobs=jobs or min(8, cpu_threads()), **options),
            say=lambda line: click.echo(line, err=as_json),
            progress=None if as_json else Progress("views"),
        )
    say_made(done, as_json)
