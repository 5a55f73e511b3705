"""A manifest is right in all its parts or one message lists every fault; caches are found newest first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cache_cases import ENVIRONMENT, GIVEN, IDENTITY, MIXED, SMALL, open_writer, rows_of, write_views

from cache_kd.cache import CacheReader, Manifest, find_caches, read_manifest, verify_cache
from cache_kd.cache.files import open_seal, seal, sha256
from cache_kd.errors import DamagedCacheError, SettingError
from cache_kd.fingerprint import canonical_json
from cache_kd.structures import View


@pytest.fixture
def content(cache: Path) -> dict[str, Any]:
    """What the manifest says, without its own checksum."""
    return open_seal(json.loads((cache / "manifest.json").read_bytes()))


def test_manifest_reads_back_equal(cache: Path, content: dict[str, Any]) -> None:
    manifest = read_manifest(cache)
    assert manifest == Manifest.from_json(content)
    assert json.loads(canonical_json(manifest.to_json())) == content
    assert manifest.identity == IDENTITY
    assert manifest.identity_digest == sha256(canonical_json(IDENTITY))
    assert manifest.head == GIVEN["head"]
    assert manifest.columns == SMALL
    assert manifest.views == (MIXED,)
    assert (manifest.num_images, manifest.shard_size, manifest.imgsz, manifest.seed) == (7, 3, 64, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2, this version reads 1"),
        ({"imgsz": 64.0}, r"imgsz is 64\.0; allowed: 1 to"),
        ({"imgsz": True}, "imgsz is True"),
        ({"num_images": 0}, "num_images is 0; allowed: 1 to"),
        ({"shard_size": 129}, "shard_size is 129"),
        ({"head": {"taps": []}}, r"head is not a head \(KeyError"),
        ({"views": ["plain-0000", "mixed-0000"]}, "views is not sorted"),
        ({"views": ["../x"]}, "views cannot be read"),
        ({"views": ["mixed-0000", "mixed-0001"]}, "shards and views name different views"),
        ({"columns": []}, "columns is empty"),
        ({"columns": [{"name": "a"}]}, "a column has exactly the keys"),
        ({"data_sha256": "xyz"}, "data_sha256 is not a sha256"),
        ({"shards": {"mixed-0000": 1}}, "shards is not a table of sha256"),
        ({"arrays": {"../up": {}}}, r"array name '\.\./up'"),
        ({"arrays": {"a": {"dtype": "O", "shape": [], "sha256": "0" * 64}}}, "'a' has a wrong dtype"),
        ({"identity": {"seed": 4}}, "identity_digest is not that of identity"),
        ({"surprise": 1}, "surprise is not known"),
    ],
)
def test_a_wrong_part_is_named(content: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedCacheError, match=f"^manifest.json: .*{message}"):
        Manifest.from_json({**content, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "f8"}, "dtype 'f8'; allowed"),
        ({"shape": [2**40, 3]}, "is over 1073741824 bytes"),
        ({"shape": [2**26, 3]}, r"shard_size 3 times \d+ bytes a sample is over"),
        ({"shape": [-2, -3]}, "at least 1"),
        ({"name": "../half"}, "a name has letters"),
        ({"name": "features"}, "named twice"),
        ({"shape": "23"}, "wrong type of shape"),
    ],
)
def test_a_hostile_column_is_refused(content: dict[str, Any], change: dict[str, Any], message: str) -> None:
    content["columns"][1].update(change)
    with pytest.raises(DamagedCacheError, match=message):
        Manifest.from_json(content)


def test_all_faults_come_in_one_message(content: dict[str, Any]) -> None:
    del content["seed"]
    with pytest.raises(
        DamagedCacheError, match=r"seed is missing; extra is not known; digest is not a sha256; imgsz is 0; allowed"
    ):
        Manifest.from_json({**content, "extra": 1, "imgsz": 0, "digest": ""})


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"format": NaN}', b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_one_line(cache: Path, text: bytes) -> None:
    (cache / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedCacheError, match=r"^[^\n]*manifest\.json: [^\n]*$"):
        read_manifest(cache)


def test_a_manifest_of_another_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    write_views(tmp_path / "other", MIXED, identity={"seed": 4})
    (cache / "manifest.json").write_bytes((tmp_path / "other/manifest.json").read_bytes())
    with pytest.raises(
        DamagedCacheError, match=r"zarr\.json and manifest\.json name different identity; `cache-kd verify .* --repair`"
    ):
        CacheReader(cache)


def test_a_wrong_digest_is_found_by_verification(cache: Path, content: dict[str, Any]) -> None:
    (cache / "manifest.json").write_bytes(seal({**content, "digest": "0" * 64}))
    assert [fault.file for fault in verify_cache(cache).faults] == ["manifest.json"]


def test_finish_refuses_a_manifest_with_other_parts(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache") as writer:
        with pytest.raises(SettingError, match="a manifest is given exactly teacher, head"):
            writer.finish([MIXED], {**GIVEN, "extra": 1})
        with pytest.raises(SettingError, match="at least one view, got none"):
            writer.finish([], GIVEN)


def test_a_bad_value_given_to_finish_publishes_no_manifest(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache") as writer:
        rows = rows_of(SMALL, MIXED)
        for shard in writer.units(MIXED):
            part = {name: [values[i] for i in writer.samples(shard)] for name, values in rows.items()}
            writer.write_unit(MIXED, shard, part, ENVIRONMENT)
        with pytest.raises(DamagedCacheError, match="as it would be written: imgsz is 0"):
            writer.finish([MIXED], {**GIVEN, "imgsz": 0})
    assert not (tmp_path / "cache/manifest.json").exists()


def test_caches_are_found_newest_first_finished_or_not(tmp_path: Path) -> None:
    assert find_caches(tmp_path / "kd_cache") == []
    folder = tmp_path / "kd_cache"
    for age, name in enumerate(["new", "old"]):
        write_views(folder / name, MIXED)
        os.utime(folder / name / "manifest.json", (1_000 - age, 1_000 - age))
    open_writer(folder / "begun").close()
    os.utime(folder / "begun/zarr.json", (500, 500))
    (folder / "photos").mkdir()
    found = find_caches(folder)
    assert [cache.path.name for cache in found] == ["new", "old", "begun"]
    assert [cache.complete for cache in found] == [True, True, False]
    assert found[0].manifest == read_manifest(folder / "new")
    assert "unfinished cache; run the same `cache-kd extract` again" in found[2].problem


def test_views_of_a_manifest_are_views(cache: Path) -> None:
    write_views(cache, View("plain", 2), View("mixed", 10))
    assert read_manifest(cache).views == (MIXED, View("mixed", 10), View("plain", 2))
