"""In: README.md with marked blocks. Out: the same, each block holding what `cache-kd COMMAND --help` prints now.

A block is marked by a comment on the line before its fence: `<!-- help:extract -->`, or `<!-- help: -->` for the
program itself. `python scripts/update_docs.py` rewrites README.md; tests/test_docs.py fails while it is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from cache_kd.cli import main

README = Path(__file__).resolve().parents[1] / "README.md"
WIDTH = 100
BLOCK = re.compile(r"(?P<head><!-- help:(?P<command>[^\n]*?) -->\n+```\w*\n)(?P<body>.*?)(?P<foot>^```$)", re.M | re.S)


def help_text(command: str) -> str:
    """Return the help of a command as printed on a terminal 100 columns wide; "" is the program itself.

    Raises:
        ValueError: There is no such command.
    """
    words = [*command.split(), "--help"]
    result = CliRunner().invoke(main, words, prog_name="cache-kd", terminal_width=WIDTH, max_content_width=WIDTH)
    if result.exit_code:
        raise ValueError(f"README marks the help of {command!r}, known: {', '.join(sorted(main.commands))}")
    return result.output.rstrip() + "\n"


def marked(text: str) -> list[tuple[str, str]]:
    """Return (command, body) of every marked block of a document."""
    return [(match["command"].strip(), match["body"]) for match in BLOCK.finditer(text)]


def updated(text: str) -> str:
    """Return the document with every marked block rewritten."""
    return BLOCK.sub(lambda match: match["head"] + help_text(match["command"].strip()) + match["foot"], text)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
