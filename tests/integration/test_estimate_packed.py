"""What an estimate foresees of a packed cache is what the finished one takes, its pixels too; a budget counts them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from small_inputs import small_data

from cache_kd.cache.removal import folder_bytes
from cache_kd.pipeline import inspection
from cache_kd.pipeline.default_losses import arrays_read
from cache_kd.pipeline.estimate import Estimate, estimate
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import Extracted, extract
from cache_kd.pipeline.opened import Cache

IMAGES = 24
SMALL: dict[str, Any] = {"views": 2, "plain_views": 1, "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0}
CLOSE = 0.1
PIXELS = ("pixels", "pixels_length")
LABELS = ("labels", "labels_length")


@pytest.fixture(scope="module", params=["jpeg:95", "png"])
def settings(request: Any, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractSettings:
    folder = tmp_path_factory.mktemp("packed")
    data = small_data(test_data / "data" / "bccd", folder / "set", train=IMAGES)
    return ExtractSettings(
        test_data / "weights" / "yolov8s-bccd.pt", data, folder / "made", pack=request.param, **SMALL
    )


@pytest.fixture(scope="module")
def found(settings: ExtractSettings) -> Estimate:
    return estimate(settings, say=print)


@pytest.fixture(scope="module")
def made(found: Estimate, settings: ExtractSettings) -> Extracted:
    return extract(settings)


def test_bytes_are_those_of_the_finished_cache(found: Estimate, made: Extracted) -> None:
    figures, items = found.chosen.figures, 3 * IMAGES
    assert made.manifest.codec["pack"]["spec"] in ("jpeg:95", "png")
    assert figures.bytes_per_view == pytest.approx(made.num_bytes / items, rel=CLOSE)
    assert figures.bytes == pytest.approx(folder_bytes(made.path), rel=CLOSE)


def test_the_pixels_are_those_of_the_finished_cache(found: Estimate, made: Extracted) -> None:
    by_column = inspection.describe(made.path)["bytes_by_column"]
    shares = {"mixed": 2 / 3, "plain": 1 / 3}
    for names in (PIXELS, LABELS):
        foreseen = sum(share * found.probed.item_bytes("default", kind, names) for kind, share in shares.items())
        assert foreseen == pytest.approx(sum(by_column[name] for name in names) / (3 * IMAGES), rel=CLOSE)
    pixels = sum(by_column[name] for name in PIXELS) / (3 * IMAGES)
    assert pixels > 0.1 * found.chosen.figures.bytes_per_view, "a part that would be missed"


def test_reading_counts_the_pixels(found: Estimate, made: Extracted) -> None:
    facts = inspection.describe(made.path)
    cache = Cache(made.path)
    read = arrays_read(cache.codec, cache.packing)
    assert {*PIXELS, *LABELS} <= set(read) and set(arrays_read(cache.codec, None)) == {*read} - {*PIXELS, *LABELS}
    assert facts["costs"]["read_bytes"] == sum(facts["bytes_by_column"][name] for name in read) / (3 * IMAGES)
    (row,) = (row for row in found.to_json()["rows"] if row["chosen"])
    assert row["read_bytes"] == pytest.approx(facts["costs"]["read_bytes"], rel=CLOSE)
    assert row["read_bytes_per_second"] == row["read_bytes"] * found.step_rate


@pytest.mark.parametrize("settings", ["png"], indirect=True)
def test_a_budget_counts_the_pixels(found: Estimate, settings: ExtractSettings, tmp_path: Path) -> None:
    """Room for what four mixed views and a plain one take with their pixels; without, five would fit."""
    figures = found.chosen.figures
    per_view = IMAGES * figures.bytes_per_view
    fixed = figures.bytes - 3 * per_view
    pixels = IMAGES * found.probed.item_bytes("default", "mixed", PIXELS)
    room = fixed + 5.5 * per_view
    assert fixed + 6 * (per_view - pixels) < room, "the budget would be overrun if pixels cost nothing"
    budget = int(room * 1.05)
    changed = {**asdict(settings), "views": 6, "fidelity": "default", "budget": budget, "cache": tmp_path / "made"}
    done = extract(ExtractSettings(**changed))
    kinds = [view.kind for view in done.manifest.views]
    assert (kinds.count("mixed"), kinds.count("plain")) == (4, 1)
    assert folder_bytes(done.path) <= budget
