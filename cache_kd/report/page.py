"""In: sections. Out: one HTML page that needs nothing else: no network, no script, readable on paper and on a phone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from cache_kd.report.blocks import NOTHING, Section, Table
from cache_kd.report.svg_plots import swatch
from cache_kd.report.verdict import KINDS

_HERE = Path(__file__).parent
_NUMBER = re.compile(
    rf"[-+±<]? ?\d[\d.]*( ?(%|B|kB|MB|GB))?( to [-+]?\d[\d.]*( %)?)?( ± \d[\d.]*| \(one seed\))?|{NOTHING}"
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d")
_LONG = 28


def page(title: str, subtitle: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """Return the page; every text is escaped, plots and style excepted, which are ours."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["drawn"] = Markup
    environment.globals.update(
        numeric=_numeric, cell_class=_cell_class, kind_of=lambda block: type(block).__name__, swatch=swatch
    )
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    made = environment.get_template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, footer=footer, style=style
    )
    return made.rstrip() + "\n"


def _numeric(table: Table, column: int) -> bool:
    """Return whether a column holds numbers, which stand at the right."""
    cells = [row[column] for row in table.rows]
    return column > 0 and any(cell != NOTHING for cell in cells) and all(map(_NUMBER.fullmatch, cells))


def _cell_class(table: Table, column: int, cell: str) -> Markup:
    classes = []
    if _numeric(table, column):
        classes.append("number")
    elif _DATE.fullmatch(cell):
        classes.append("date")
    elif len(cell) > _LONG and table.head[column] != "verdict":
        classes.append("long")
    if table.head[column] == "verdict":
        classes.append("verdict")
        classes += [cell] if cell in (KINDS["better"], KINDS["worse"]) else []
    return Markup(f' class="{" ".join(classes)}"') if classes else Markup("")
