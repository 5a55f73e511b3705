"""Writers of one unit at the same time: equal bytes are kept, other bytes never mixed, the published stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import ENVIRONMENT, GIVEN, MIXED, NUM_IMAGES, PLAIN, SMALL, open_writer, rows_of, write_views

from cache_kd.cache import CacheWriter
from cache_kd.cache.extraction_plan import read_plan
from cache_kd.cache.files import open_seal, parse_json, seal
from cache_kd.cache.folder_store import FolderStore
from cache_kd.cache.verify import verify_cache
from cache_kd.errors import CacheKDError, DamagedCacheError, MissingFileError
from cache_kd.structures import View

Rows = dict[str, list[np.ndarray]]
RECORD = "units/mixed-0000-00000.json"


def unit_rows(writer: CacheWriter, view: View, shard: int = 0) -> Rows:
    """Return the rows of one unit."""
    rows = rows_of(SMALL, view)
    return {name: [values[index] for index in writer.samples(shard)] for name, values in rows.items()}


def write_rest(writer: CacheWriter, *views: View) -> None:
    """Write every unit that is open."""
    for view in views:
        for shard in writer.units(view):
            if not writer.done(view, shard):
                assert writer.begin_unit(view, shard)
                writer.write_unit(view, shard, unit_rows(writer, view, shard), ENVIRONMENT)


def rounded(rows: Rows) -> Rows:
    """Return the rows as a machine with other roundings would have them."""
    return {**rows, "half": [row + np.float16(1) for row in rows["half"]]}


def rounded_features(rows: Rows) -> Rows:
    """The same for features; the shard has as many bytes."""
    return {**rows, "features": [row[::-1].copy() for row in rows["features"]]}


def meanwhile(monkeypatch: pytest.MonkeyPatch, name: str, do: Any) -> None:
    """Have `do` happen once, right before a file of this name is created."""
    before, happened = FolderStore.create, []

    def create(self: FolderStore, relative: str, content: bytes) -> bool:
        if name in relative and not happened:
            happened.append(relative)
            do()
        return before(self, relative, content)

    monkeypatch.setattr(FolderStore, "create", create)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[CacheWriter, CacheWriter]:
    return open_writer(tmp_path / "cache", shared=True), open_writer(tmp_path / "cache", shared=True)


@pytest.mark.parametrize("moment", ["views/mixed-0000/features/c", "views/mixed-0000/pixel_hash/c", RECORD])
@pytest.mark.parametrize("other", [False, True])
def test_two_make_one_unit(
    pair: tuple[CacheWriter, CacheWriter], monkeypatch: pytest.MonkeyPatch, moment: str, other: bool
) -> None:
    first, second = pair
    rows = unit_rows(first, MIXED)
    theirs = rounded(rows) if other else rows
    meanwhile(monkeypatch, moment, lambda: second.write_unit(MIXED, 0, theirs, {"host": "there"}))
    made = first.write_unit(MIXED, 0, rows, ENVIRONMENT)
    write_rest(first, MIXED)
    first.finish([MIXED], GIVEN)
    second.close()
    report = verify_cache(Path(str(first.place)))
    assert report.ok, report.faults
    if not other:
        assert made.environment == {"host": "there"}, "the record that came first stays"


@pytest.mark.parametrize("other", [False, True])
def test_a_published_file_that_was_replaced_all_the_same_takes_the_record_with_it(
    pair: tuple[CacheWriter, CacheWriter], monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    """A dead writer left a file; the first sees no record and replaces it after the second has published the unit."""
    first, second = pair
    rows, before, published = unit_rows(first, MIXED), FolderStore.write, list[str]()
    left = "views/mixed-0000/features/c/0/0"
    first.store.write(left, b"left behind")

    def write(self: FolderStore, relative: str, content: bytes) -> None:
        if self is first.store and relative == left and not published:
            published.append(relative)
            second.write_unit(MIXED, 0, rounded_features(rows) if other else rows, {"host": "there"})
        before(self, relative, content)

    monkeypatch.setattr(FolderStore, "write", write)
    made = first.write_unit(MIXED, 0, rows, ENVIRONMENT)
    assert published and made.environment == (ENVIRONMENT if other else {"host": "there"})
    write_rest(first, MIXED)
    first.finish([MIXED], GIVEN)
    second.close()
    report = verify_cache(Path(str(first.place)))
    assert report.ok, report.faults


def test_two_that_never_agree_stop(pair: tuple[CacheWriter, CacheWriter], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair
    rows, before = unit_rows(first, MIXED), FolderStore.write

    def write(self: FolderStore, relative: str, content: bytes) -> None:
        if self is first.store and "features/c" in relative:
            second.write_unit(MIXED, 0, rounded_features(rows), ENVIRONMENT)
        before(self, relative, content)

    first.store.write("views/mixed-0000/features/c/0/0", b"left behind")
    monkeypatch.setattr(FolderStore, "write", write)
    with pytest.raises(
        CacheKDError, match=r"mixed-0000-00000.json: other writers make this unit too, with other bytes"
    ):
        first.write_unit(MIXED, 0, rows, ENVIRONMENT)


def test_a_plan_tells_all_that_finish_needs(tmp_path: Path) -> None:
    whole = write_views(tmp_path / "whole", MIXED, PLAIN)
    path = tmp_path / "parts"
    with open_writer(path, shared=True) as writer:
        writer.plan([MIXED, PLAIN], GIVEN, 2)
        write_rest(writer, MIXED, PLAIN)
    plan = read_plan(FolderStore(path))
    assert (plan.views, plan.parts, plan.begun.num_images) == ((MIXED, PLAIN), 2, NUM_IMAGES)
    with CacheWriter.open_begun(path, shared=True) as writer:
        assert writer.finish(plan.views, dict(plan.manifest)) == whole
    assert verify_cache(path).ok and not (path / "extraction.json").exists() and not (path / "attempts").exists()
    with pytest.raises(MissingFileError, match=r"has no extraction.json: nothing is being extracted there"):
        CacheWriter.open_begun(path)


def test_the_plan_of_a_top_up_outlives_the_end_of_what_was_begun_before(tmp_path: Path) -> None:
    early, late = open_writer(tmp_path / "cache", shared=True), open_writer(tmp_path / "cache", shared=True)
    early.plan([MIXED], GIVEN)
    late.plan([MIXED, PLAIN], GIVEN)
    write_rest(early, MIXED)
    assert late.begin_unit(PLAIN, 0)
    early.finish([MIXED], GIVEN)
    assert read_plan(FolderStore(tmp_path / "cache")).views == (MIXED, PLAIN)
    assert late.attempts.counted() == {(PLAIN, 0): 1}
    late.close()


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("shard_size", 0, "shard_size 0 or parts 1 is out of range"),
        ("num_images", 8, "it is not that of the cache in zarr.json"),
        ("manifest", {}, "not the plan of an extraction"),
        ("views", ["front-0"], "no such view"),
        ("arrays", {"w": 3}, "not subscriptable"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path: Path, part: str, value: Any, says: str) -> None:
    with open_writer(tmp_path / "cache") as writer:
        writer.plan([MIXED], GIVEN)
    file = tmp_path / "cache" / "extraction.json"
    file.write_bytes(seal({**open_seal(parse_json(file.read_bytes(), file)), part: value}))
    with pytest.raises(DamagedCacheError, match=rf"extraction.json cannot be read \(.*{says}.*\); the same"):
        read_plan(FolderStore(tmp_path / "cache"))


def test_a_writer_that_gave_its_lock_back_drops_no_record_of_the_next_one(tmp_path: Path) -> None:
    first = open_writer(tmp_path / "cache")
    first.write_unit(MIXED, 0, unit_rows(first, MIXED), ENVIRONMENT)
    first.close()
    with open_writer(tmp_path / "cache"):
        (shard,) = (tmp_path / "cache" / "views" / MIXED.name / "features" / "c" / "0").glob("**/0")
        shard.write_bytes(b"cut")
        with pytest.raises(CacheKDError, match=r"another extraction is writing .* has its lock"):
            first.done(MIXED, 0)
        assert (tmp_path / "cache" / RECORD).exists()
