"""In: texts and drawings. Out: what a report is made of; the page and the Markdown show the same of these."""

from __future__ import annotations

from dataclasses import dataclass

NOTHING = "–"


@dataclass(frozen=True)
class Text:
    """A paragraph; `lead` is what a reader is to see first."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Items:
    """A list of sentences, each behind its lead where there are leads; `warning` sets the list off."""

    items: tuple[str, ...]
    leads: tuple[str, ...] = ()
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names the row. All cells are text as shown."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """An SVG element; `words` say what it shows to who cannot see it, `note` how to read it.

    legend: (place in the palette, name).
    """

    svg: str
    title: str
    words: str
    note: str
    legend: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Plots:
    """Plots that stand beside each other where there is room."""

    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Section:
    """A part of the report; a folded one is closed until a reader opens it."""

    title: str
    blocks: tuple[Block, ...]
    folded: bool = False


Block = Text | Items | Table | Plots | Section
