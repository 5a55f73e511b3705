"""Every command in the documents is one that the program takes, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from cache_kd.cli import main
from scripts.update_docs import DOCUMENTS, ROOT

FENCED = re.compile(r"^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`(cache-kd [^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]\[]+\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
OWN_LOSS = re.compile(r'^LOSSES\["(\w+)"\]', re.M)
TEXTS = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
OWN_LOSSES = {name for text in TEXTS.values() for name in OWN_LOSS.findall(text)}


def commands_in(text: str) -> Iterator[str]:
    """Yield the commands in fenced blocks, as one line each, comments and what follows a pipe or && taken off."""
    for block in FENCED.finditer(text):
        for line in block["body"].replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ").split("&&")[-1].strip()
            words = words.removeprefix(".venv/bin/")
            if words.startswith("cache-kd "):
                yield words


COMMANDS = sorted({(document.name, line) for document, text in TEXTS.items() for line in commands_in(text)})


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """Return the command's name and what click makes of its words; raises `click.UsageError` as the program would."""
    _, name, *words = shlex.split(line, comments=True)
    if name not in main.commands:
        raise click.UsageError(f"no command {name!r}")
    # With the program above it: click keeps the --help option of a command's first context for good.
    above = click.Context(main, info_name="cache-kd", **main.context_settings)
    return name, main.commands[name].make_context(name, words, parent=above).params


def check_values(name: str, given: dict[str, Any]) -> None:
    """Raise the program's own error for values that click passes on as words."""
    from cache_kd.codecs import FIDELITIES
    from cache_kd.config import parse_size
    from cache_kd.losses import parse_losses
    from cache_kd.structures import STORES, View
    from cache_kd.views.packing import parse_packing

    tests: dict[str, Callable[[Any], Any]] = {
        "fidelity": lambda value: FIDELITIES[value],
        "store": lambda value: [STORES.index(store) for store in value.split(",")],
        "pack": parse_packing,
        "budget": lambda value: parse_size(value, "--budget"),
        "view": View.parse,
        "verify_pixels": ("first", "all", "off").index,
        "augmentation": check_augmentation,
        "settings": check_training_keys,
    }
    for key, value in given.items():
        if value and key in tests:
            tests[key](value)
    specs = [spec for spec in given.get("losses", ()) if spec.partition(":")[0] not in {*OWN_LOSSES, "none", "NAME"}]
    parse_losses(specs)
    if name == "run" and given["recipe"].stem != "X" and given["recipe"].parts[0] == "pipelines":
        check_recipe(ROOT / given["recipe"], given["changes"])


def check_augmentation(pairs: tuple[str, ...]) -> None:
    from cache_kd.config import parse_pairs
    from cache_kd.ultralytics_bridge.settings import check_settings
    from cache_kd.views.recipe import RECIPE_KEYS

    given = parse_pairs(pairs)
    assert set(given) <= set(RECIPE_KEYS), set(given) - set(RECIPE_KEYS)
    check_settings(given)


def check_training_keys(pairs: tuple[str, ...]) -> None:
    from cache_kd.config import parse_pairs
    from cache_kd.ultralytics_bridge.settings import check_settings, check_training_settings

    given = parse_pairs(pairs)
    check_settings(given)
    check_training_settings(given)


def check_recipe(file: Path, changes: tuple[str, ...]) -> None:
    """Raise `KeyError` unless each change is of a value that the recipe has."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for change in changes:
        place: Any = content
        for part in change.partition("=")[0].split("."):
            place = place[part]


def slug(heading: str) -> str:
    """Return the anchor that code hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {slug(heading) for heading in HEADING.findall(FENCED.sub("", text))}


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=lambda value: value)
def test_every_command_in_a_block_is_taken(document: str, line: str) -> None:
    check_values(*parsed(line))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_sentences_name_what_there_is(document: Path) -> None:
    for line in INLINE.findall(FENCED.sub("", TEXTS[document])):
        words = line.split()
        if words[1].startswith("-"):
            assert words[1] in {"--version", "--debug", "--help"}, line
            continue
        known = {option for parameter in main.commands[words[1]].params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cache-kd trian --student a.yaml", "no command 'trian'"),
        ("cache-kd train --student a.yaml --los ld", "No such option '--los'"),
        ("cache-kd verify", "Missing parameter: cache"),
        ("cache-kd train --student a.yaml --threads 0", "0 is not in the range"),
    ],
)
def test_a_wrong_command_is_found(line: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=re.escape(message)):
        parsed(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cache-kd train --student a.yaml --loss cwdd", "no loss 'cwdd'"),
        ("cache-kd train --student a.yaml epoch=3", "'epoch' is not a valid YOLO argument"),
        ("cache-kd extract --teacher best.pt --fidelity fine", "fine"),
        ("cache-kd run pipelines/smoke.yaml --set seed=[0]", "seed"),
    ],
)
def test_a_wrong_value_is_found(line: str, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=re.escape(message)):
        check_values(*parsed(line))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for match in LINK.finditer(FENCED.sub("", TEXTS[document])):
        target, _, anchor = match["target"].partition("#")
        if "://" in target:
            continue
        file = (document.parent / target).resolve() if target else document
        assert file.exists(), f"{document.name}: {match['target']}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{document.name}: {match['target']}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {match["target"].partition("#")[0] for match in LINK.finditer(index)}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked
