"""A record comes back as it was written; what is no record is refused in one line that says where and why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache_kd.errors import InputDataError, MissingFileError
from cache_kd.report.record import FILE, EpochRecord, RunRecord
from tests.unit.report.run_cases import run


def _changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = run("cached", 0, 0.4).to_json()
    change(content)
    return content


@pytest.mark.parametrize("mode", ["plain", "online", "cotrained", "cached"])
def test_record_comes_back_equal(tmp_path: Path, mode: str) -> None:
    record = run("an arm", 3, 0.4, mode, warnings=("slow",))
    record.write(tmp_path / FILE)
    assert RunRecord.read(tmp_path / FILE) == record
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert json.loads((tmp_path / FILE).read_text())["judged"]["mAP50-95"] == 0.4


def test_run_that_nobody_judged_comes_back() -> None:
    record = run("an arm", 0, 0.4, judged=None, cache=None, recipe=None, teacher=None)
    assert RunRecord.from_json(record.to_json()) == record


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    record = run("an arm", 0, 0.4, epochs=(EpochRecord(1, 2.0, {"train/cwd_loss": math.nan, "lr": math.inf}, {}),))
    record.write(tmp_path / FILE)
    assert "NaN" not in (tmp_path / FILE).read_text()
    assert RunRecord.read(tmp_path / FILE).epochs[0].metrics == {"train/cwd_loss": None, "lr": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("seed"), "lacks seed$"),
        (lambda content: content.update(sead=1), r"has unknown sead \(known: recipe, study"),
        (lambda content: content.update(seed="0"), "seed is '0'; allowed: a whole number"),
        (lambda content: content.update(seed=True), "seed is True; allowed: a whole number"),
        (lambda content: content.update(arm=None), "arm is None; allowed: text"),
        (lambda content: content.update(losses="cwd"), "losses is 'cwd'; allowed: a list"),
        (lambda content: content.update(losses=["cwd", 3]), r"losses\[1\] is 3; allowed: text"),
        (lambda content: content.update(record=2), "record is 2; allowed: 1"),
        (
            lambda content: content.update(mode="offline"),
            "mode is .offline.; allowed: plain, online, cot.*",
        ),
        (lambda content: content["cache"].pop("digest"), "cache lacks digest$"),
        (lambda content: content["cache"].update(bytes=1.5), "cache.bytes is 1.5; allowed: a whole number"),
        (lambda content: content["epochs"][1].update(extra=1), r"epochs\[1\] has unknown extra"),
        (
            lambda content: content["epochs"][0]["metrics"].update(a="x"),
            r"epochs\[0\].metrics.a is 'x'; allowed: a number",
        ),
        (lambda content: content["epochs"].reverse(), r"epochs are \[12, 11.*; allowed: rising from 1"),
        (lambda content: content["epochs"][3].update(seconds=0.5), "seconds are .*; allowed: since the start, rising"),
        (lambda content: content["judged"].update({"mAP50-95": 36.2}), "judged map50_95 is 36.2; allowed: 0 to 1"),
        (lambda content: content["judged"].pop("mAP50-95"), "judged lacks mAP50-95$"),
        (lambda content: content.update(started="yesterday"), "started is 'yesterday'; allowed: a time as"),
        (lambda content: content.update(arm=""), "arm is empty"),
    ],
)
def test_what_is_no_record_is_refused(change: Callable[[dict[str, Any]], object], said: str) -> None:
    with pytest.raises(InputDataError, match=said) as caught:
        RunRecord.from_json(_changed(change))
    assert "\n" not in str(caught.value)


def test_constructor_checks_too() -> None:
    with pytest.raises(InputDataError, match="mode is 'none'; allowed"):
        replace(run("an arm", 0, 0.4), mode="none")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufeff", "[" * 100_000, '{"record": NaN}'])
def test_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputDataError, match=FILE) as caught:
        RunRecord.read(tmp_path / FILE)
    assert "\n" not in str(caught.value)


def test_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such file: .*record\.json"):
        RunRecord.read(tmp_path / FILE)
