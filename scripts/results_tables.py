"""In: the kept records of the recipes' runs. Out: the Markdown tables of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from cache_kd.pipeline.reporting import report
from cache_kd.report.blocks import NOTHING, Block, Section, Table
from cache_kd.report.contents import contents
from cache_kd.report.findings import Findings, headline
from cache_kd.report.markdown import plain, table

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SCORES, PAIRS, CLASSES, BUDGET, COST = "on test, in points", "Pairs", "by class", "Validation", "Cost"
"""Words in the captions of the report's tables."""


@cache
def findings(recipe: str) -> Findings:
    """Return what the report says of a recipe's kept runs."""
    return report([RESULTS / recipe])


def _tables(blocks: tuple[Block, ...]) -> Iterator[Table]:
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Section):
            yield from _tables(block.blocks)


def report_table(recipe: str, *captions: str) -> str:
    """Return the report's tables whose captions hold the words given, and where they come from.

    Students of two kinds have a table each, under its caption. Raises ValueError where the report has no such table.
    """
    found = findings(recipe)
    every = [one for section in contents(found) for one in _tables(section.blocks)]
    parts = []
    for words in captions:
        fitting = [one for one in every if words in one.caption]
        if not fitting:
            raise ValueError(f"{recipe}: the report has no table whose caption holds {words!r}")
        heads = [f"{one.caption}:\n\n" if len(fitting) > 1 else "" for one in fitting]
        parts += [head + table(_said(one)) for head, one in zip(heads, fitting, strict=True)]
    return "\n\n".join([*parts, _origin(recipe, found)]) + "\n"


def _said(one: Table) -> Table:
    """Return a table without the columns that say nothing in any row."""
    told = [at for at in range(len(one.head)) if any(row[at] != NOTHING for row in one.rows)]
    return Table(
        one.caption, tuple(one.head[at] for at in told), tuple(tuple(row[at] for at in told) for row in one.rows)
    )


def verdict(recipe: str) -> str:
    """Return the report's headline on a recipe's runs."""
    return "".join(f"**{plain(headline(group))}**\n" for group in findings(recipe).groups)


def _origin(recipe: str, found: Findings) -> str:
    records = [run.record for run in found.runs]
    days = sorted({record.started[:10] for record in records})
    machine, versions = records[0].machine, records[0].versions
    threads = " or ".join(str(count) for count in sorted({record.machine.threads for record in records}))
    device = machine.gpu or f"{machine.processor}, {threads} thread{'' if threads == '1' else 's'} a run"
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "ultralytics", "cache-kd"))
    run = COMMANDS.get(recipe, f"pipelines/{recipe}.yaml")
    return (
        f"{len(records)} runs, {' to '.join(dict.fromkeys((days[0], days[-1])))}, {device}, {known}; "
        f"`cache-kd run {run}`, `cache-kd report docs/results/{recipe}`."
    )


COMMANDS = {
    "twice_as_long": "pipelines/default_losses.yaml --set name=twice_as_long --set epochs=120 --set seeds=[0] "
    "--arm plain --arm cwd",
    "to_the_plateau": "pipelines/default_losses.yaml --set name=to_the_plateau --set epochs=240 "
    "--set settings.val=true --set caches.views20.views=60 --set seeds=[0,1] --arm plain --arm cwd",
    "trained_student": "pipelines/coco128_mgd.yaml --set name=trained_student --set teacher=best.pt "
    "--set data=bccd.yaml --set student=plain.pt --set imgsz=160 --set split=test "
    "--set caches.views10.views=20 --set settings.val=false --set seeds=[0]",
    "half_as_long": "pipelines/default_losses.yaml --set name=half_as_long --set epochs=30 --set seeds=[0,1] "
    "--arm plain --arm cwd",
    "small_and_short": "pipelines/default_losses.yaml --set name=small_and_short --set epochs=30 --set imgsz=128 "
    "--set caches.views20.views=4 --set seeds=[0,1] --arm plain --arm cwd --arm 'cwd half' --arm ld+bckd",
}
"""What was run where no file has the name of the results."""
RECIPES = {
    "loss_ablation": (SCORES, CLASSES),
    "default_losses": (SCORES, CLASSES),
    "half_as_long": (SCORES,),
    "small_and_short": (SCORES,),
    "twice_as_long": (SCORES,),
    "to_the_plateau": (SCORES, CLASSES),
    "other_views": (SCORES, PAIRS),
    "views_curve": (SCORES,),
    "fidelity_ablation": (SCORES, PAIRS),
    "one_cache_many_students": (SCORES,),
    "trained_student": (SCORES,),
    "offline_vs_online": (SCORES, PAIRS, CLASSES, BUDGET, COST),
}
TABLES: dict[str, Callable[[], str]] = {
    name: made
    for recipe, captions in RECIPES.items()
    if (RESULTS / recipe).is_dir()
    for name, made in (
        (f"results {recipe}", partial(report_table, recipe, *captions)),
        (f"verdict {recipe}", partial(verdict, recipe)),
    )
}
