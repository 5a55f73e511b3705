"""Caches of many images: what is read before the first row, what stays in memory, which limits grow with the images.

The caches are 20 000 images x 3 views, all their lists as the program writes them, without rows.
"""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache_kd import fingerprint
from cache_kd.cache import creation, files, manifest, reader
from cache_kd.cache.files import parse_json
from cache_kd.cache.folder_store import FolderStore
from cache_kd.cache.reader import CacheReader
from cache_kd.errors import DamagedCacheError, InputDataError, MismatchError
from cache_kd.fingerprint import compare_sources
from cache_kd.pipeline import costs
from cache_kd.pipeline.costs import recorded_seconds
from cache_kd.pipeline.inspection import describe, lines
from cache_kd.pipeline.locations import newest_cache
from cache_kd.pipeline.opened import Cache
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.packed import PackedImages, PackedViews
from cache_kd.views.packing import JpegPixels
from scripts.bench.synthetic_cache import SECONDS, SyntheticCache

IMAGES, VIEWS, UNITS, ARRAYS = 20_000, 3, 157, 9
DATA, LIST = "data.json", "views/mixed-000{}/shards.json"


class NoRows:
    """A reader without rows."""

    def read(self, view: View, index: int, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
        raise AssertionError(f"row {index} of {view.name} is asked for")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyntheticCache]:
    made = SyntheticCache(tmp_path_factory.mktemp("large") / "c", IMAGES, VIEWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        made.write()
        made.write_records(VIEWS, files=False)
    yield made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of a cache is read, from now on."""
    counted: Counter[str] = Counter()
    plain = FolderStore.read

    def read(self: FolderStore, relative: str, limit: int) -> bytes:
        counted[relative] += 1
        return plain(self, relative, limit)

    monkeypatch.setattr(FolderStore, "read", read)
    return counted


def first_file(cache: CacheReader, view: int) -> object:
    layout = cache.layouts["features"]
    chosen = cache.manifest.views[view]
    return cache.files(chosen)[layout.shard_path(chosen, 0)]


def test_a_training_reads_each_list_once_and_of_one_view(
    large: SyntheticCache, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_KD_CACHE", str(large.path.parent))
    cache = Cache(newest_cache()[0])
    assert not reads[DATA] and not any("shards" in name for name in reads), "opening reads no list"
    compare_sources(cache.images, large.sources)
    first_file(cache.reader, 0)
    first_file(cache.reader, 0)
    asked = {name: count for name, count in reads.items() if name not in ("manifest.json", "zarr.json")}
    assert asked == {DATA: 1, LIST.format(0): 1}
    assert reads["manifest.json"] == reads["zarr.json"] == 2, "once to find the newest, once to open it"


def test_the_images_take_no_more_memory_than_their_rows(large: SyntheticCache) -> None:
    cache = Cache(large.path)
    tracemalloc.start()
    try:
        assert len(cache.images) == IMAGES
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (large.path / DATA).stat().st_size
    assert held < 3.4 * size and peak < 5.5 * size  # 3.0 and 4.8; more where the rows of the file are kept too


def test_lists_of_views_that_are_over_are_let_go(
    large: SyntheticCache, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_LISTED", 2 * UNITS * ARRAYS)
    cache = CacheReader(large.path)
    entries = [first_file(cache, view) for view in (0, 1, 2)]
    assert [view.number for view in cache._files] == [1, 2]
    assert [first_file(cache, view) for view in (2, 1, 0)] == entries[::-1]
    assert [view.number for view in cache._files] == [1, 0], "the one that was used longest ago goes"
    assert [reads[LIST.format(view)] for view in (0, 1, 2)] == [2, 1, 1]


def test_the_list_of_one_view_is_kept_however_long(
    large: SyntheticCache, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_LISTED", 1)
    cache = CacheReader(large.path)
    assert first_file(cache, 0) == first_file(cache, 0)
    assert reads[LIST.format(0)] == 1


def test_inspect_reads_each_list_once(
    large: SyntheticCache, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_LISTED", 1)
    facts = describe(large.path)
    assert [reads[LIST.format(view)] for view in range(VIEWS)] == [1, 1, 1]
    assert facts["bytes"] == Cache(large.path).num_bytes


def test_inspect_asks_some_units_of_a_large_cache(
    large: SyntheticCache, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every, items = recorded_seconds(Cache(large.path))
    assert sum(name.startswith("units/") for name in reads) == VIEWS * UNITS and items == VIEWS * IMAGES
    reads.clear()
    monkeypatch.setattr(costs, "MOST_RECORDS", 50)
    facts = describe(large.path)
    asked = [name for name in reads if name.startswith("units/")]
    assert 40 <= len(asked) <= 50 and {name.split("-")[1] for name in asked} == {"0000", "0001", "0002"}
    assert facts["costs"]["items_timed"] < facts["costs"]["items"] == VIEWS * IMAGES
    total = sum(seconds for stage, seconds in every.items() if stage != "forward")
    (took,) = (line for line in lines(facts) if "took" in line)
    assert float(took.split()[1]) == pytest.approx(total, rel=0.02), "what some took stands for all"
    assert f"by {facts['costs']['items_timed']} of {VIEWS * IMAGES} views" in took
    assert set(facts["costs"]["seconds"]) == {*SECONDS, "total"}


def test_equal_lists_of_images_are_not_paired(large: SyntheticCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def paired(*_: object) -> list[tuple[int, int]]:
        raise AssertionError("sorting out a million equal images")

    monkeypatch.setattr(fingerprint, "_same_images", paired)
    compare_sources(large.sources, large.sources)
    monkeypatch.undo()
    for found in (large.sources[:-1], large.sources[::-1]):
        with pytest.raises(MismatchError, match="not the one that the teacher saw"):
            compare_sources(large.sources, found)


def test_plain_json_is_not_searched_for_halves_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DamagedCacheError, match="half of a surrogate pair"):
        parse_json(rb'["\ud800"]', "here")
    monkeypatch.setattr(files, "_HALF", None)
    assert parse_json('["a\\\\n\\"", "ü𝄞"]'.encode(), "here") == ['a\\n"', "ü𝄞"]


def test_nesting_is_counted_through_objects_and_lists() -> None:
    for left, right in (("[", "]"), ('{"a":', "}")):
        document = left * (files.MAX_DEPTH + 1) + "1" + right * (files.MAX_DEPTH + 1)
        assert parse_json(document.encode(), "here")
        with pytest.raises(DamagedCacheError, match="nested more than 64 levels"):
            parse_json((left + document + right).encode(), "here")


def test_the_list_of_images_may_be_as_long_as_there_are_images(
    large: SyntheticCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (large.path / DATA).stat().st_size
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", size - 1)
    assert len(Cache(large.path).images) == IMAGES
    monkeypatch.setattr(manifest, "_IMAGE_BYTES", 20)
    with pytest.raises(
        DamagedCacheError, match=f"data.json: the file has {size} bytes, at most {size - 1} are allowed"
    ):
        _ = Cache(large.path).images


def test_a_list_of_images_that_nobody_could_read_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", 1000)
    monkeypatch.setattr(manifest, "_IMAGE_BYTES", 100)
    with pytest.raises(InputDataError, match=r"data.json would have .* bytes for 20 images; allowed: 2000; give the"):
        SyntheticCache(tmp_path / "c", 20, 1).open_writer()
    assert not (tmp_path / "c").exists()


def test_an_extraction_goes_on_with_a_long_list_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SyntheticCache(tmp_path / "c", 200, 1).write()
    for module in (manifest, creation):
        monkeypatch.setattr(module, "MAX_JSON_BYTES", 20_000)  # about 25 000 bytes; the images were renamed meanwhile
    renamed = SyntheticCache(tmp_path / "c", 200, 1, folder="moved")
    renamed.open_writer().close()


def test_workers_of_packed_views_are_not_sent_the_labels() -> None:
    """A million tables of labels take .8 GB; where workers are spawned each would get them."""
    images = PackedImages(
        [f"{number}.jpg" for number in range(1000)],
        shapes=np.full((1000, 2), 64, np.int32),
        counts=np.full(1000, 2, np.uint32),
        boxes=np.zeros((2000, 5), np.float32),
    )
    views = PackedViews(NoRows(), JpegPixels(), 64, images)
    bare = len(pickle.dumps(views))
    assert len(views.labels) == 1000
    sent = pickle.dumps(views)
    assert len(sent) == bare and len(pickle.loads(sent).labels) == 1000
