"""In: a recipe. Out: the command that runs it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cache_kd.cli.group import main
from cache_kd.cli.output import PATH, Progress, quiet
from cache_kd.errors import RecipeError


@main.command()
@click.argument("recipe", type=PATH)
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Change a value of the recipe, as epochs=3.")
@click.option("--arm", "arms", multiple=True, metavar="NAME", help="Do this arm only; may be given more than once.")
@click.option("--dry-run", is_flag=True, help="Check it, show what is done and what is left, and do nothing.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at once; default: the recipe's, one a GPU, half the cores.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def run(
    recipe: Path, changes: tuple[str, ...], arms: tuple[str, ...], dry_run: bool, jobs: int | None, as_json: bool
) -> None:
    """Run a recipe: make its caches, train its arms with every seed, judge them, one record a run.

    Everything that is wrong with it is said first. What is done is skipped, and what was begun goes on: the same
    command continues after an interruption. A run that fails does not end the others.

    \b
    cache-kd run pipelines/smoke.yaml
    cache-kd run pipelines/loss_ablation.yaml --set teacher=best.pt --set seeds=[0,1] --dry-run
    cache-kd run pipelines/loss_ablation.yaml --arm plain --arm cwd --set seeds=[2]
    """
    with quiet(as_json):
        from cache_kd.pipeline.recipes.execution import run_recipe_file

        try:
            result = run_recipe_file(
                recipe,
                changes=changes,
                arms=arms,
                jobs=jobs,
                dry_run=dry_run,
                say=lambda line: click.echo(line, err=as_json),
                progress=None if as_json else Progress("views"),
            )
        except RecipeError as error:
            for fault in error.faults:
                click.echo(f"cache-kd: {' '.join(fault.split())}", err=True)
            raise SystemExit(1) from None
    if as_json:
        click.echo(json.dumps(result.to_json()))
    if not result.ok:
        raise SystemExit(1)
