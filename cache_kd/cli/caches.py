"""In: folders of caches. Out: the commands that look at them, check, mend and delete them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cache_kd.cli.group import main
from cache_kd.cli.output import CACHE, PATH, Progress, quiet

PICTURE_OPTIONS = ("image", "view", "student", "teacher", "data", "trust_student", "trust_teacher", "imports")


@main.command()
@click.argument("cache", type=CACHE)
@click.option("--out", type=PATH, help="Draw pictures into this folder: of a view, or a sheet of several.")
@click.option("--image", help="Number or name of an image; default: a few.")
@click.option("--view", help="3, mixed:3 or plain:0; default: all views.")
@click.option("--student", type=PATH, help="Draw this checkpoint's boxes, too.")
@click.option("--teacher", type=PATH, help="The cache's teacher: draw what the codec changed of what it says.")
@click.option("--data", type=PATH, help="Data file; default: the one that the extraction used.")
@click.option("--trust-student", is_flag=True, help="Let the student's file run code while it loads.")
@click.option("--trust-teacher", is_flag=True, help="Let the teacher's file run code while it loads.")
@click.option("--import", "imports", multiple=True, type=PATH, help="Your own Python file with model classes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def inspect(cache: Any, out: Path | None, as_json: bool, **options: Any) -> None:
    """Say what a cache holds and what it was made from; with --out draw views of it.

    Of one view: labels beside the teacher's boxes, its maps as heat, and what the codec keeps of them.

    \b
    cache-kd inspect kd_cache/bccd-best-1a2b3c4d
    cache-kd inspect kd_cache/bccd-best-1a2b3c4d --out pictures
    cache-kd inspect kd_cache/bccd-best-1a2b3c4d --image 5 --view plain:0 --out pictures
    """
    if out is None and (given := [name for name in PICTURE_OPTIONS if options[name]]):
        option = "import" if given[0] == "imports" else given[0].replace("_", "-")
        raise click.UsageError(f"--{option} is about pictures; say where to draw them: --out pictures.")
    with quiet(as_json):
        from cache_kd.pipeline.inspection import describe, lines

        facts = describe(cache)
        if out is not None:
            from cache_kd.pipeline.pictures import PictureSettings, draw

            drawn = draw(cache, PictureSettings(out, **options))
            facts["pictures"], facts["notes"] = list(map(str, drawn.files)), list(drawn.notes)
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo("\n".join([*map(str, drawn.files), *drawn.notes] if out is not None else lines(facts)))


@main.command()
@click.argument("cache", type=CACHE)
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
def verify(cache: Any, as_json: bool, repair: bool, jobs: int | None, **options: Any) -> None:
    """Check a cache: manifest, sizes, sha256 and crc32c of everything; on request pixels and targets too.

    \b
    cache-kd verify kd_cache/bccd-best-1a2b3c4d
    cache-kd verify kd_cache/bccd-best-1a2b3c4d --pixels --teacher best.pt
    cache-kd verify kd_cache/bccd-best-1a2b3c4d --repair --teacher best.pt
    """
    if repair and (options["pixels"] or options["fraction"] < 1):
        raise click.UsageError("--repair reads every file and no pixels; leave --pixels and --fraction out.")
    with quiet(as_json):
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
            reading=None if as_json else Progress("MB", each=1_000_000),
            progress=None if as_json else Progress("units" if repair else "views"),
            **options,
        )
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        click.echo("\n".join(report.lines()))
    if not report.ok:
        raise SystemExit(1)


@main.command(name="list")
@click.argument("folder", type=CACHE, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def list_(folder: Any, as_json: bool) -> None:
    """List the caches in a folder, by default kd_cache/ or CACHE_KD_CACHE: size, age, last use, what they hold.

    \b
    cache-kd list
    """
    from cache_kd.pipeline.caches import list_caches, table, to_json

    found = list_caches(folder)
    click.echo(json.dumps(to_json(found)) if as_json else table(found, folder))


@main.command()
@click.argument("caches", type=CACHE, nargs=-1, metavar="CACHE...")
@click.option("--unfinished", is_flag=True, help="Delete all unfinished caches of the default place.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def rm(caches: tuple[Any, ...], unfinished: bool, yes: bool, as_json: bool) -> None:
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
        left = "; files that are not the cache's are still there" if isinstance(path, Path) and path.exists() else ""
        click.echo(f"{path}: deleted, {megabytes(size)} freed{left}")
