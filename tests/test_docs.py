"""README shows the help that the program prints, and the set-up commands are single lines that stand by themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.update_docs import DOCUMENTS, README, TABLES, help_text, marked, marked_tables, updated

TEXT = README.read_text(encoding="utf-8")
STALE = "before\n\n<!-- help:train -->\n```\nstale\n```\n\nafter\n\n<!-- help: -->\n\n```text\n```\n"


def test_readme_help_is_current() -> None:
    assert len(marked(TEXT)) == TEXT.count("<!-- help:"), "a help comment must stand right before a fenced block"
    for command, body in marked(TEXT):
        assert body == help_text(command), f"{command}: run `python -m scripts.update_docs`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_current(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert len(marked_tables(text)) == text.count("<!-- table:"), "a table ends with <!-- end --> on a line of its own"
    for name, body in marked_tables(text):
        assert body == TABLES[name](), f"{document.name}, {name}: run `python -m scripts.update_docs`"


def test_every_table_is_shown() -> None:
    shown = {name for document in DOCUMENTS for name, _ in marked_tables(document.read_text(encoding="utf-8"))}
    assert shown == set(TABLES)


def test_update_rewrites_marked_blocks_only() -> None:
    fresh = updated(STALE)
    assert marked(fresh) == [("train", help_text("train")), ("", help_text(""))]
    assert help_text("train").startswith("Usage: cache-kd train ")
    assert "-h, --help" in help_text("train")
    assert "stale" not in fresh
    assert fresh.startswith("before\n\n<!-- help:train -->\n```\nUsage")
    assert updated(fresh) == fresh


def test_unknown_command_is_refused() -> None:
    with pytest.raises(ValueError, match=r"help of 'trian', known: .*train"):
        help_text("trian")


@pytest.mark.parametrize("ending", ["cache-kd demo", "python -m pytest"])
def test_set_up_is_one_fenced_line(ending: str) -> None:
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", TEXT, re.M | re.S)).splitlines()
    found = [line for line in fenced if line.startswith("python -m venv .venv && ") and line.endswith(ending)]
    assert len(found) == 1
