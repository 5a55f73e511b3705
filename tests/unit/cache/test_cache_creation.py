"""The list of images in a cache: other names for the same content are taken, other content and damage are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cache_cases import MIXED, PLAIN, open_writer, write_views

from cache_kd.cache.creation import DATA
from cache_kd.cache.manifest import read_manifest
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.verify import verify_cache
from cache_kd.errors import DamagedCacheError, MismatchError
from cache_kd.fingerprint import SourceImage, digest_sources

SOURCES = [SourceImage(f"{i}.jpg", 9, f"{i}" * 32, f"{i}" * 32) for i in range(7)]
RENAMED = [SourceImage(f"train/{row.path}", row.bytes, row.image, row.label) for row in SOURCES]
OTHER = [*SOURCES[:3], SourceImage("3.jpg", 9, "f" * 32, SOURCES[3].label), *SOURCES[4:]]


def of(rows: list[SourceImage], **more: Any) -> dict[str, Any]:
    identity = {"data": digest_sources(rows), "seed": 3, **more}
    return {"identity": identity, "data": {"images": [row.to_json() for row in rows], "skipped": []}}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_views(tmp_path / "cache", MIXED, **of(SOURCES))
    return tmp_path / "cache"


def test_renamed_images_are_taken_and_the_first_names_stay(cache: Path) -> None:
    before = (cache / DATA).read_bytes()
    write_views(cache, PLAIN, **of(RENAMED))
    assert (cache / DATA).read_bytes() == before
    assert CacheReader(cache).read_data()["images"][0][0] == "0.jpg"
    assert len(read_manifest(cache).views) == 2 and verify_cache(cache).ok


def test_an_unfinished_cache_takes_the_names_of_its_last_run(tmp_path: Path) -> None:
    open_writer(tmp_path / "cache", **of(SOURCES)).close()
    manifest = write_views(tmp_path / "cache", MIXED, **of(RENAMED))
    assert CacheReader(tmp_path / "cache").read_data()["images"][0][0] == "train/0.jpg"
    assert manifest.digest == write_views(tmp_path / "other", MIXED, **of(SOURCES)).digest
    assert verify_cache(tmp_path / "cache").ok


def test_the_images_that_differ_are_named_instead_of_their_digest(cache: Path) -> None:
    image = r"the image of item 3 \(3.jpg\) changed: content 3{12} there, f{12} now"
    with pytest.raises(MismatchError, match=rf"something else \(seed: 3 there, 4 wanted; {image}\)"):
        open_writer(cache, **of(OTHER, seed=4))


@pytest.mark.parametrize("damage", [b"", b"{", b'{"images": [[1, 2, 3, 4]]}', b'{"images": [["0.jpg"]]}', b"[]"])
def test_digests_are_named_where_the_list_of_images_is_damaged(cache: Path, damage: bytes) -> None:
    (cache / DATA).write_bytes(damage)
    with pytest.raises(MismatchError, match=r"something else \(data.images: \w{12} there, \w{12} wanted\)"):
        open_writer(cache, **of(OTHER))


def test_a_damaged_list_of_images_is_written_again_or_refused_but_never_taken(cache: Path) -> None:
    """One changed letter of a name leaves valid JSON with the same images by content."""
    before = (cache / DATA).read_bytes()
    (cache / DATA).write_bytes(before.replace(b"0.jpg", b"1.jpg"))
    with pytest.raises(DamagedCacheError, match=r"data\.json is not the one that manifest\.json names; run `cache-kd"):
        open_writer(cache, **of(RENAMED))
    open_writer(cache, **of(SOURCES)).close()
    assert (cache / DATA).read_bytes() == before
    (cache / DATA).unlink()
    (cache / DATA).symlink_to(cache / "manifest.json")
    open_writer(cache, **of(SOURCES)).close()
    assert not (cache / DATA).is_symlink() and (cache / DATA).read_bytes() == before
