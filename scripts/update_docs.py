"""In: README.md with marked blocks. Out: the same, each block holding what `cache-kd COMMAND --help` prints now.

A block is marked by a comment on the line before its fence: `<!-- help:extract -->`, or `<!-- help: -->` for the
program itself. `python scripts/update_docs.py` rewrites README.md; tests/test_docs.py fails while it is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from cache_kd.cli import main

README = Path(__file__).resolve().parents[1] / "README.md"
WIDTH = 100
BLOCK = re.compile(r"(?P<head><!-- help:(?P<command>[^\n]*?) -->\n+```\w*\n)(?P<body>.*?)(?P<foot>^```$)", re.M | re.S)


def help_text(command: str) -> str:
    """Return the help of a command as printed on a terminal 100 columns wide; "" is the program itself.

    Raises:
        ValueError: There is no such command.
    """
    target: click.Command = main
    context = click.Context(main, info_name="cache-kd", terminal_width=WIDTH, max_content_width=WIDTH)
    for word in command.split():
        found = target.get_command(context, word) if isinstance(target, click.Group) else None
        if found is None:
            raise ValueError(f"README marks the help of {command!r}, known: {', '.join(sorted(main.commands))}")
        target = found
        context = click.Context(target, info_name=word, parent=context, terminal_width=WIDTH, max_content_width=WIDTH)
    return target.get_help(context).rstrip() + "\n"


def marked(text: str) -> list[tuple[str, str]]:
    """Return (command, body) of every marked block of a document."""
    return [(match["command"].strip(), match["body"]) for match in BLOCK.finditer(text)]


def updated(text: str) -> str:
    """Return the document with every marked block rewritten."""
    return BLOCK.sub(lambda match: match["head"] + help_text(match["command"].strip()) + match["foot"], text)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
