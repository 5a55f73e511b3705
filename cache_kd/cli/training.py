"""In: a student, a cache, losses. Out: the commands that train: `train`, `demo`, and `losses`, which they can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cache_kd.cli.group import main
from cache_kd.cli.output import CACHE, PATH, quiet


@main.command()
@click.option("--student", help="Model YAML or checkpoint, as yolov8n.yaml.")
@click.option("--cache", type=CACHE, help="Folder or URL of a cache; default: the newest complete one in kd_cache/.")
@click.option("--data", type=PATH, help="Data file; default: the one that the extraction used.")
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="SPEC",
    help="NAME[:key=value,…], repeatable, or none; default: cwd, or ld where the cache holds logits alone.",
)
@click.option("--balance", type=float, metavar="SHARE", help="Hold each term at this share of the neck's gradient.")
@click.option("--name", help="Name of the run's folder under runs/detect; default: train.")
@click.option("--verify-pixels", default="first", show_default=True, help="first, all or off.")
@click.option("--views", type=int, help="Show only the cache's first so many mixed views; default: all.")
@click.option("--plain-views", type=int, help="Show only the cache's first so many plain views; default: all.")
@click.option("--fetch-limit", metavar="SIZE", help="Local copies of a cache in an object store; default: 50GB.")
@click.option("--shuffle-window", type=click.IntRange(1), help="Shuffle within so many shards; default: all that fit.")
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
    cache-kd train --student yolov8n.yaml batch=64 device=0,1
    cache-kd train resume=runs/detect/train/weights/last.pt
    """
    from cache_kd.config import parse_pairs, parse_size

    pairs = parse_pairs(settings)
    if student is None and not pairs.get("resume"):
        raise click.UsageError("Missing option '--student', for example --student yolov8n.yaml.")
    limit = options.pop("fetch_limit")
    if limit is not None:
        options["fetch_limit"] = parse_size(limit, "--fetch-limit")
    from cache_kd.pipeline.train_settings import TrainSettings
    from cache_kd.pipeline.training import train as run

    done = run(TrainSettings(student=student or "", settings=pairs, **options), say=click.echo)
    click.echo(f"run: {done.folder}")


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
    with quiet(as_json):
        from cache_kd.demo.story import tell

        result = tell(out, seed=seed, say=lambda line: click.echo(line, err=as_json))
    click.echo(json.dumps(result.to_json()) if as_json else result.table())
