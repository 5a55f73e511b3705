"""The four files hold the same numbers; the page is whole, needs nothing else, and shows every text as text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cache_kd.report.files import texts, write
from cache_kd.report.findings import Findings, find
from cache_kd.report.reading import Run, Runs
from cache_kd.report.svg_plots import Interval, Line, interval_plot, line_plot
from tests.unit.report.run_cases import arm, run

EVIL = '<script>alert("x")</script> | $a_b$ & `c` **d**'
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects what a page holds and checks that every element that is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        if {"td", "th"} & set(self.open[-1:]):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def found() -> Findings:
    records = [
        *arm("plain", [0.361, 0.358, 0.364], "plain"),
        *arm("cached, cwd", [0.38123, 0.3771, 0.3841]),
        *arm("online", [0.371, 0.378, 0.369], "online"),
        *arm(EVIL, [0.352, 0.357], "cotrained", warnings=(f"{EVIL} was slow",)),
        run("one", 0, 0.39),
    ]
    runs = tuple(Run(Path(f"runs/{at}/record.json"), record) for at, record in enumerate(records))
    return find(Runs(runs, (f"runs/{EVIL}: broken",)))


@pytest.fixture(scope="module")
def made(found: Findings) -> dict[str, str]:
    return texts(found)


@pytest.fixture(scope="module")
def page(made: dict[str, str]) -> Page:
    return Page(made["report.html"])


def test_page_is_well_formed_and_says_what_it_is(page: Page) -> None:
    assert page.tags[0] == ("html", {"lang": "en"})
    metas = [attributes for tag, attributes in page.tags if tag == "meta"]
    assert {"charset": "utf-8"} in metas
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id stands for two elements"
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links
    assert {str(link).removeprefix("#") for link in links} <= set(ids)


def test_page_needs_nothing_else(made: dict[str, str], page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("href", "src", "xlink:href", "srcset", "action"):
                assert value == "data:," or str(value).startswith("#"), f"<{tag} {name}={value}>"
    assert not re.findall(r"https?://|//[a-z]|@import", made["report.html"])
    assert set(re.findall(r"url\((.)", made["report.html"])) <= {"#"}


def test_references_inside_plots_are_found(made: dict[str, str], page: Page) -> None:
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', made["report.html"]))
    assert len(used) > 20
    assert used <= ids


def test_texts_of_records_are_shown_as_text(made: dict[str, str], page: Page) -> None:
    assert any(EVIL in text for _, text in page.texts)
    cells = [cell for table in page.tables for row in table for cell in row]
    assert EVIL in cells
    assert "<script" not in made["report.html"]
    assert EVIL in {arm["arm"] for arm in json.loads(made["report.json"])["groups"][0]["arms"]}
    assert EVIL in {row["arm"] for row in csv.DictReader(io.StringIO(made["report.csv"]))}
    for line in made["report.md"].splitlines():
        assert not re.search(r"(?<!\\)<script", line)


def test_markdown_tables_are_whole(made: dict[str, str]) -> None:
    lines = made["report.md"].splitlines()
    tables = [at for at, line in enumerate(lines) if line.startswith("| --- ")]
    assert len(tables) > 5
    for at in tables:
        columns = len(lines[at].split("|"))
        rows = [lines[at - 1], *_following(lines, at + 1)]
        assert len(rows) > 1
        for row in rows:
            assert len(re.split(r"(?<!\\)\|", row)) == columns, row


def _following(lines: list[str], at: int) -> Iterator[str]:
    while at < len(lines) and lines[at].startswith("|"):
        yield lines[at]
        at += 1


def test_tables_have_heads_and_captions(page: Page) -> None:
    assert len(page.tables) > 6
    for table in page.tables:
        assert len({len(row) for row in table}) == 1, table[0]
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    assert scopes.count("row") == sum(len(table) - 1 for table in page.tables)
    assert sum(tag == "caption" for tag, _ in page.tags) == len(page.tables)


def test_every_plot_has_words(page: Page) -> None:
    plots = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(plots) >= 3
    assert all(len(str(plot["aria-label"])) > 25 for plot in plots)
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(svg.get("aria-hidden") == "true" and svg.get("viewbox") for svg in svgs)


def test_numbers_are_the_same_everywhere(made: dict[str, str], page: Page) -> None:
    document = json.loads(made["report.json"])
    (group,) = document["groups"]
    rows = {row[0]: row for row in page.tables[0]}
    lines = {
        re.sub(r"\\(.)", r"\1", cells[0]): [re.sub(r"\\(.)", r"\1", cell) for cell in cells]
        for line in made["report.md"].splitlines()
        if line.startswith("|") and (cells := re.split(r" (?<!\\)\| ", line.strip("| ")))[-1] != "---"
        if len(cells) == len(rows["arm"])
    }
    against = {one["arm"]: one for one in group["against_plain"]}
    by_arm: dict[str, list[float]] = {}
    for row in csv.DictReader(io.StringIO(made["report.csv"])):
        by_arm.setdefault(row["arm"], []).append(float(row["points"]))
    assert len(group["arms"]) == 5
    for found_arm in group["arms"]:
        name, spread = found_arm["arm"], found_arm["mAP50-95"]
        assert rows[name] == lines[name]
        assert sorted(by_arm[name]) == pytest.approx(sorted(found_arm["points"].values()))
        assert spread["mean"] == pytest.approx(sum(by_arm[name]) / len(by_arm[name]))
        sd = (
            f"{spread['mean']:.2f} (one seed)" if spread["sd"] is None else f"{spread['mean']:.2f} ± {spread['sd']:.2f}"
        )
        assert rows[name][2] == sd
        if name in against:
            difference = against[name]["difference"]
            assert rows[name][3] == f"{difference['mean']:+.2f}"
            ends = difference["interval"]
            assert rows[name][4] == ("–" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}")
    assert f"{group['headline']}" in "".join(text for _, text in page.texts)


def test_same_runs_give_the_same_bytes(found: Findings, made: dict[str, str]) -> None:
    assert texts(found) == made


def test_files_are_written_whole(found: Findings, made: dict[str, str], tmp_path: Path) -> None:
    files = write(found, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["report.html", "report.md", "report.csv", "report.json"]
    assert {file.name: file.read_text() for file in files} == made
    assert sorted(path.name for path in files[0].parent.iterdir()) == sorted(made)


def test_plots_follow_the_style_of_the_page() -> None:
    line = Line("a", 1, (1.0, 2.0), (1.0, 3.0), (0.5, 2.5), (1.5, 3.5))
    for svg in (
        line_plot("p", [Line("plain", 0, (1.0, 2.0), (1.0, 2.0)), line], x="epoch", y="loss & <more>", log=True),
        interval_plot("q", [Interval("<b>$x$", 1, 1.0, (0.5, 1.5), (0.9, 1.1))], margin=1.0, x="points"),
    ):
        assert svg.startswith('<svg aria-hidden="true" viewBox=')
        assert "var(--arm1)" in svg
        assert "currentColor" in svg
        assert "#0072b2" not in svg
        assert "<text" in svg, "text is text, not outlines"
        assert not re.search(r"https?:|<metadata|<style|xmlns", svg)
        Page(svg)
