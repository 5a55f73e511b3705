"""In: folders of runs. Out: the command that compares them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cache_kd.cli.group import main
from cache_kd.cli.output import PATH, quiet

DEFAULT = Path("runs/report")


@main.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option("--out", type=PATH, help=f"Folder for the report; default: {DEFAULT}.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON; files only with --out.")
def report(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare runs: one page, readable offline, with mean and spread over seeds, curves, cost, and what they support.

    RUN is the folder of a run of run, train or yolo train, or a folder of such. Arms are compared with the plain one:
    by equal seeds where there are, with a 95 % interval and a test of equivalence within one point. Writes report.html,
    report.md, report.csv and report.json.

    \b
    cache-kd report runs/detect
    cache-kd report runs/smoke --out reports/smoke
    """
    with quiet(as_json):
        from cache_kd.pipeline.reporting import report as compare
        from cache_kd.report.files import write
        from cache_kd.report.findings import headline, to_document

        found = compare(runs)
        files = write(found, out or DEFAULT) if out or not as_json else []
    for fault in found.faults:
        click.echo(f"cache-kd: left out: {fault}", err=True)
    if as_json:
        click.echo(json.dumps(to_document(found), allow_nan=False))
        return
    for group in found.groups:
        click.echo(f"{group.group.title}: {headline(group)}")
    click.echo("\n".join(str(file) for file in files))
