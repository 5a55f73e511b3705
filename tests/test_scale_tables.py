"""The sums of docs/scale.md: counted against a cache as the program lists it, and by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from ultralytics.utils import ROOT

from cache_kd.cache.layout import layouts
from cache_kd.cache.listing import metadata_files
from cache_kd.cache.reader import CacheReader
from cache_kd.codecs import FIDELITIES
from scripts import scale_tables
from scripts.bench.synthetic_cache import SyntheticCache
from scripts.measured_tables import newest
from scripts.scale_tables import DATA, DataSet, _job, objects, shard_samples, view_bytes


def test_objects_are_those_of_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    made = SyntheticCache(tmp_path / "c", 1000, 3)
    manifest = made.write()
    reader = CacheReader(tmp_path / "c")
    shards = sum(len(reader.files(view)) for view in manifest.views)
    every = layouts(manifest.columns, manifest.num_images, manifest.shard_size)
    described = [name for name in metadata_files(manifest, every) if name.startswith("views/mixed")]
    units, lists = 3 * 8, 3
    assert objects(3, 1000, manifest.shard_size, len(every)) == shards + len(described) + units + lists
    assert shard_samples(640, "default", 80) == manifest.shard_size == 128


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_arrays_are_those_of_the_codec(fidelity: str) -> None:
    for imgsz in (320, 640):
        columns = scale_tables.stored_columns(scale_tables.codec(imgsz, fidelity, 80), None)
        assert set(view_bytes(imgsz, fidelity, 80)) == {c.name for c in scale_tables.with_lengths(columns)}


def test_only_logits_grow_with_the_classes() -> None:
    few, many = view_bytes(640, "default", 80), view_bytes(640, "default", 226)
    assert few["logits"] == newest("view-cost")["figures"][scale_tables.MANY_CLASSES]["bytes"]["default"]["logits"]
    assert many["logits"] == pytest.approx(2 * few["logits"])  # (226 + 66) over (80 + 66)
    assert {**many, "logits": 0} == {**few, "logits": 0}
    assert view_bytes(320, "default", 80)["logits"] == pytest.approx(few["logits"] / 4)


def test_a_job_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_tables, "view_bytes", lambda *_: {"features": 4e5, "logits": 1e5})
    monkeypatch.setattr(scale_tables, "seconds", lambda *_: {"forward": 0.3, "around": 0.06})
    found = _job(DataSet("mine", 1_000_000, 80, 1.0), 640, 10)
    # 7 813 units a view: 3 objects and an attempt's record each; 10 views with 2 arrays, a group and a list
    assert found == ["5.0 TB", "234,430", "$1.56", "$115", "1,000", "5.6 h, $11"]


@pytest.mark.parametrize(("data", "file"), [*zip(DATA, ("coco", "Objects365", "open-images-v7"), strict=True)])
def test_the_data_sets_are_as_ultralytics_describes_them(data: DataSet, file: str) -> None:
    text = (ROOT / "cfg" / "datasets" / f"{file}.yaml").read_text(encoding="utf-8")
    (images,) = re.findall(r"^train: .* (\d+) images$", text, re.M)
    (gigabytes,) = re.findall(r"downloads here .*?([\d.]+) ?GB?(?: data|\))", text)
    assert data.images == int(images) and data.bytes == float(gigabytes) * 1e9
    assert data.classes == len(yaml.safe_load(text)["names"])
