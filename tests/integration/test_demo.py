"""The demo's story runs to its end on a small schedule and its table says what its own runs measured."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cache_kd.demo import story
from cache_kd.demo.schedule import SCHEDULE


def test_the_story_writes_table_result_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(SCHEDULE, images=16, val_images=4, imgsz=64, teacher_epochs=1, student_epochs=2, views=1)
    monkeypatch.setattr(story, "SCHEDULE", small)
    result = story.tell(tmp_path, seed=0, say=lambda _: None)
    assert [row.name for row in result.rows] == ["teacher", "cache", "plain", *(name for name, _ in small.distilled)]
    assert result.rows[1].teacher_forwards == 16 * 2
    assert [row.forwards_saved for row in result.rows] == [0, 0, 0, 32, 32]
    for row in result.rows[2:]:
        with (tmp_path / row.name / "results.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
        columns = {name.strip(): value for name, value in last.items()}
        assert ("train/cwd_loss" in columns) == (row.name == "cwd")
        assert ("train/ld_loss" in columns) == (row.name == "ld + bckd")
    assert json.loads((tmp_path / "result.json").read_text())["rows"][2]["map50_95"] == result.rows[2].map50_95
    assert (tmp_path / "table.md").read_text().startswith("| model | mAP50-95 |")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_verdict_claims_no_more_than_the_numbers() -> None:
    rows = [story.Row(name, value, value, 1.0, 0, 0, 0) for name, value in (("teacher", 0.5), ("plain", 0.4))]
    rows += [story.Row("cache", None, None, 1.0, 10, 5, 0), story.Row("cwd", 0.35, 0.5, 1.0, 0, 0, 9)]
    verdict = story.DemoResult(tuple(rows), 1.0, Path("runs")).verdict()
    assert "+10.0 points from the plain student" in verdict
    assert "cwd -5.0 points" in verdict
    assert "anecdote" in verdict
