"""In: sections. Out: the same as Markdown, plots left to the page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cache_kd.report.blocks import Block, Items, Plots, Section, Table, Text

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#&])")


def markdown(title: str, subtitle: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """Return the report as Markdown text."""
    parts = [f"# {plain(title)}", *map(plain, subtitle)]
    for section in sections:
        parts += _section(section, 2)
    return "\n\n".join([*parts, plain(footer)]) + "\n"


def plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table(shown: Table) -> str:
    """Return the lines of a table without its caption."""
    head, *rows = ([plain(cell) for cell in row] for row in (shown.head, *shown.rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _section(section: Section, level: int) -> Iterator[str]:
    yield f"{'#' * level} {plain(section.title)}"
    for block in section.blocks:
        yield from _block(block, level)


def _block(block: Block, level: int) -> Iterator[str]:
    match block:
        case Text(text, lead):
            yield f"**{plain(text)}**" if lead else plain(text)
        case Items():
            leads = [f"**{plain(lead)}**: " for lead in block.leads] or [""] * len(block.items)
            yield "\n".join(f"- {lead}{plain(item)}" for lead, item in zip(leads, block.items, strict=True))
        case Table():
            yield f"{plain(block.caption)}:"
            yield table(block)
        case Plots(plots):
            yield "\n".join(f"- {plain(plot.title)} (plot: report.html). {plain(plot.words)}" for plot in plots)
        case Section():
            yield from _section(block, level + 1)
