"""`cache-kd report` writes four files and says the verdict; --json prints one document; faults are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cache_kd.cli import main
from cache_kd.report.record import FILE
from tests.unit.report.run_cases import arm

NAMES = ["report.html", "report.md", "report.csv", "report.json"]


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, words)], prog_name="cache-kd")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs and of one record that is none; what has no folder is written into the working directory."""
    records = [*arm("plain", [0.36, 0.361, 0.359], "plain"), *arm("cached", [0.38, 0.382, 0.379])]
    for record in records:
        folder = tmp_path / "runs" / f"{record.arm}-{record.seed}"
        folder.mkdir(parents=True)
        record.write(folder / FILE)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / FILE).write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_files_are_written_and_the_verdict_is_said(runs: Path) -> None:
    done = call(runs, "--out", "here")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in Path("here").iterdir()) == sorted(NAMES)
    said = done.stdout.splitlines()
    assert said[0] == ("yolov8n.yaml on bccd.yaml at 160 px, last weights on test: Better than plain: cached (+2.03).")
    assert said[1:] == [str(Path("here") / name) for name in NAMES]
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cache-kd: left out: ")
    assert "broken" in done.stderr
    assert "broken" in Path("here/report.html").read_text()


def test_report_has_a_place_of_its_own(runs: Path) -> None:
    assert call(runs).exit_code == 0
    assert sorted(path.name for path in Path("runs/report").iterdir()) == sorted(NAMES)
    again = call(runs)
    assert again.exit_code == 0
    assert "6 runs, 2 arms" in Path("runs/report/report.md").read_text()


def test_json_is_one_document_and_no_file(runs: Path) -> None:
    done = call(runs, "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert len(document["runs"]) == 6
    assert document["groups"][0]["against_plain"][0]["verdict"]["kind"] == "better"
    assert not Path("runs/report").exists()
    assert call(runs, "--json", "--out", "here").exit_code == 0
    assert json.loads(Path("here/report.json").read_text()) == document


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nowhere", "cache-kd: no such file or folder: nowhere; allowed: a record.json, "),
        ("runs/broken", "is not JSON: Expecting property name"),
        ("empty", "cache-kd: no run in empty, no record.json and no results.csv beside an args.yaml"),
    ],
)
def test_what_is_no_run_is_one_line(runs: Path, word: str, said: str) -> None:
    Path("empty").mkdir()
    done = call(word)
    assert done.exit_code == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("runs/report").exists()
