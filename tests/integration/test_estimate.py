"""What an estimate foresees is what the finished cache takes; an estimate leaves nothing; a budget is kept."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_inputs import small_data

from cache_kd.cache import disk
from cache_kd.cache.removal import folder_bytes
from cache_kd.cli import main
from cache_kd.errors import CacheKDError, DiskSpaceError, SettingError
from cache_kd.pipeline import estimate as estimation
from cache_kd.pipeline import inspection
from cache_kd.pipeline.default_losses import arrays_read
from cache_kd.pipeline.estimate import Estimate, estimate
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import Extracted, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.recoding import RecodeSettings, recode

IMAGES = 36
SMALL: dict[str, Any] = {"views": 2, "plain_views": 1, "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0}
CLOSE = 0.1


@pytest.fixture(scope="module")
def data_file(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(test_data / "data" / "bccd", tmp_path_factory.mktemp("set"), train=IMAGES)


@pytest.fixture(scope="module")
def settings(test_data: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractSettings:
    cache = tmp_path_factory.mktemp("caches") / "made"
    return ExtractSettings(test_data / "weights" / "yolov8s-bccd.pt", data_file, cache, **SMALL)


@pytest.fixture(scope="module")
def found(settings: ExtractSettings) -> Estimate:
    """An estimate at fidelity default; it looks at safe and small beside it."""
    return estimate(settings, say=print)


@pytest.fixture(scope="module")
def made(found: Estimate, settings: ExtractSettings) -> Extracted:
    """The extraction, after the estimate."""
    return extract(settings)


def tree(*folders: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*"))}


def test_an_estimate_leaves_nothing(settings: ExtractSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings.data is not None
    before = tree(settings.data.parent)
    words = [word for name in ("views", "imgsz", "batch", "device") for word in (f"--{name}", str(SMALL[name]))]
    words += ["--teacher", str(settings.teacher), "--data", str(settings.data), "--json"]
    done = CliRunner().invoke(main, ["estimate", *words], catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert (list(tmp_path.rglob("*")), tree(settings.data.parent)) == ([], before)
    shape = [(row["fidelity"], row["views"], row["chosen"]) for row in facts["rows"]]
    assert [row[:2] for row in shape] == [(name, k) for name in ("safe", "default", "small") for k in (1, 2, 4)]
    assert [row for row in shape if row[2]] == [("default", 2, True)]
    assert facts["cache"].startswith("kd_cache/bccd-yolov8s-bccd-")
    assert facts["disk"]["write_bytes_per_second"] > 0 and facts["plain_step"]["images_per_second"] > 0


def test_bytes_are_those_of_the_finished_cache(found: Estimate, made: Extracted) -> None:
    figures = found.chosen.figures
    items = IMAGES * 3
    assert figures.items == items
    assert figures.bytes_per_view == pytest.approx(made.num_bytes / items, rel=CLOSE)
    assert figures.bytes == pytest.approx(folder_bytes(made.path), rel=CLOSE)


def test_bytes_of_a_neighbour_are_those_of_its_cache(
    found: Estimate, settings: ExtractSettings, tmp_path: Path
) -> None:
    (row,) = (row for row in found.rows if (row.fidelity, row.views) == ("small", 1))
    changed = {**asdict(settings), "views": 1, "fidelity": "small", "cache": tmp_path / "small"}
    made = extract(ExtractSettings(**changed))
    assert row.figures.bytes_per_view == pytest.approx(made.num_bytes / (2 * IMAGES), rel=CLOSE)


def test_inspect_shows_the_same_figures(found: Estimate, made: Extracted) -> None:
    facts = inspection.describe(made.path)
    costs = facts["costs"]
    assert facts["bytes_per_view"] == pytest.approx(found.chosen.figures.bytes_per_view, rel=CLOSE)
    assert costs["read_bytes"] == pytest.approx(found.chosen.figures.read_bytes, rel=CLOSE)
    names = arrays_read(Cache(made.path).codec, None)
    assert costs["read_bytes"] == sum(facts["bytes_by_column"][name] for name in names) / (3 * IMAGES)
    assert costs["items_timed"] == 3 * IMAGES
    seconds = costs["seconds"]
    assert set(seconds) == {"views", "targets", "forward", "write", "total"} and min(seconds.values()) > 0
    assert seconds["total"] == pytest.approx(seconds["views"] + seconds["targets"] + seconds["write"])
    assert seconds["forward"] < seconds["targets"] and seconds["total"] < made.seconds
    assert costs["items_per_second"] == pytest.approx(3 * IMAGES / seconds["total"])
    assert costs["break_even"] == pytest.approx(3 * seconds["total"] / seconds["forward"])
    text = "\n".join(inspection.lines(facts))
    (took,) = re.findall(r"took +(.*) s \(targets (.*) with .* of the forward pass, views (.*), write (.*)\), ", text)
    assert float(took[0]) == pytest.approx(sum(map(float, took[1:])), abs=0.2)
    assert "kB a view for cwd" in text and f"break-even after {costs['break_even']:.1f} student-epochs" in text


def test_the_break_even_is_that_of_the_seconds(found: Estimate) -> None:
    for row in found.rows:
        saved = IMAGES * found.probed.seconds.forward
        assert row.figures.break_even == pytest.approx(row.figures.seconds / saved)
    by_views = {row.views: row.figures.seconds for row in found.rows if row.fidelity == "default"}
    assert by_views[1] < by_views[2] < by_views[4]


def test_a_disk_that_may_not_be_written_is_one_line(
    settings: ExtractSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(CacheKDError, match=r"^cannot go on probing the disk of .*: Permission denied$"):
        disk.write_rate(tmp_path / "a" / "b")


# -- a budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("views", "room", "expected"), [(5, 4.4, ("default", 4)), (1, 3.0, ("safe", 1))])
def test_a_budget_is_kept_and_said(
    found: Estimate, settings: ExtractSettings, tmp_path: Path, views: int, room: float, expected: tuple[str, int]
) -> None:
    """Room for some views at fidelity default and the plain one."""
    per_view = IMAGES * found.chosen.figures.bytes_per_view
    fixed = found.chosen.figures.bytes - 3 * per_view
    budget = int((fixed + (1 + room) * per_view) * 1.05)
    said: list[str] = []
    changed = {**asdict(settings), "views": views, "budget": budget, "cache": tmp_path / "made"}
    done = extract(ExtractSettings(**changed), say=said.append)
    kinds = [view.kind for view in done.manifest.views]
    assert (done.manifest.codec["fidelity"], kinds.count("mixed"), kinds.count("plain")) == (*expected, 1)
    assert folder_bytes(done.path) <= budget
    assert said[0].startswith(
        f"budget {budget / 1e6:.1f} MB: fidelity {expected[0]}, {expected[1]} of {views} mixed views"
    )
    assert extract(ExtractSettings(**changed)).items == 0, "the same command chooses the same again"


def test_a_budget_for_no_view_is_one_line(settings: ExtractSettings, tmp_path: Path) -> None:
    changed = {**asdict(settings), "budget": 10_000, "cache": tmp_path / "made"}
    with pytest.raises(DiskSpaceError, match=r"^--budget 10.0 kB is too small: 1 mixed and 1 plain views at .* take"):
        extract(ExtractSettings(**changed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["40", "forty GB", "-3GB", "0MB", "nanGB", "1e400TB", "40 GiB", ""])
def test_a_bad_size_is_one_line(text: str) -> None:
    done = CliRunner().invoke(main, ["extract", "--teacher", "best.pt", "--budget", text])
    assert done.exit_code == 1
    assert (
        done.stderr == f"cache-kd: --budget {text!r} is no size; allowed: a number and a unit, as 500MB, 40GB, 1.5TB\n"
    )


# -- recoding ---------------------------------------------------------------------------------------------------------


def test_a_recoded_cache_says_what_it_took(made: Extracted, tmp_path: Path) -> None:
    done = recode(RecodeSettings(made.path, "small", cache=tmp_path / "small"), say=print)
    facts = inspection.describe(done.path)
    assert facts["recoded_from"] == [{"identity": made.manifest.identity_digest, "fidelity": "default"}]
    assert set(facts["costs"]["seconds"]) == {"recode", "write", "total"} and facts["costs"]["break_even"] is None
    assert "at fidelity small, recoded from default (" in "\n".join(inspection.lines(facts))


def test_an_unknown_fidelity_is_refused_before_anything_is_run(settings: ExtractSettings) -> None:
    assert estimation.FIDELITIES
    with pytest.raises(SettingError, match=r"^--fidelity 'fine' is unknown; known: default, exact, safe, small, tiny"):
        estimate(ExtractSettings(**{**asdict(settings), "fidelity": "fine"}), say=print)
