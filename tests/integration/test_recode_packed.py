"""A packed cache is recoded to a packed one: views to the byte, trained from without images; fewer logits by labels."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_inputs import small_data
from student_runs import train_student

from cache_kd.cache.verify import verify_cache
from cache_kd.codecs.logits import SparseLogits
from cache_kd.errors import MismatchError, MissingFileError
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import extract
from cache_kd.pipeline.inspection import describe, lines
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.recoding import RecodeSettings, recode
from cache_kd.pipeline.verification import verify
from cache_kd.ultralytics_bridge import dataset as datasets
from cache_kd.ultralytics_bridge.kept_anchors import KeptAnchors
from cache_kd.views import packing

SETTINGS: dict[str, Any] = {"views": 1, "plain_views": 1, "imgsz": 64, "batch": 4, "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def exact_packed(test_data: Path, bccd_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache of fidelity exact that is packed as JPEG, and a data file of which the training images are gone."""
    folder = tmp_path_factory.mktemp("exact_packed")
    data = small_data(test_data / "data" / "bccd", folder / "set", train=12)
    extract(ExtractSettings(bccd_teacher, data, folder / "cache", fidelity="exact", pack="jpeg", **SETTINGS))
    for kind in ("images", "labels"):
        shutil.rmtree(data.parent / kind / "train")
    return folder / "cache", data


@pytest.fixture(scope="module")
def recoded(exact_packed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recoded") / "default"
    return recode(RecodeSettings(exact_packed[0], "default", cache=path, jobs=2), say=print).path


def sent(cache: Cache, index: int, *, plain: bool = False) -> np.ndarray:
    found = cache.read(0, index, plain=plain).sent
    assert found is not None
    return found


def labelled(cache: Cache, index: int) -> np.ndarray:
    """Return (A,) bool, the anchors in labelled boxes of view 0."""
    boxes = cache.dataset.sample(cache.views[0], index).boxes
    return KeptAnchors(cache.manifest.head, 64, ("logits",)).in_box(boxes)


def test_views_and_labels_stay_to_the_byte(exact_packed: tuple[Path, Path], recoded: Path) -> None:
    source, cache = Cache(exact_packed[0]), Cache(recoded)
    names = ("pixels", "labels", "pixel_hash")
    for view in source.views:
        for index in range(12):
            rows = [one.reader.read(view, index, names) for one in (source, cache)]
            assert all(np.array_equal(rows[0][name], rows[1][name]) and len(rows[0][name]) for name in names)
    for name in source.manifest.arrays:
        assert np.array_equal(source.reader.read_teacher(name), cache.reader.read_teacher(name))
    assert cache.manifest.arrays == source.manifest.arrays and "packed.probe" in cache.manifest.arrays
    assert verify_cache(recoded).ok and cache.num_bytes < source.num_bytes


def test_it_says_that_it_is_packed(exact_packed: tuple[Path, Path], recoded: Path) -> None:
    source, cache = Cache(exact_packed[0]).manifest, Cache(recoded).manifest
    assert cache.codec["pack"] == cache.identity["codec"]["pack"] == source.codec["pack"]
    assert cache.codec["pack"]["spec"] == "jpeg:95" and cache.codec["fidelity"] == "default"
    assert cache.identity["recoded_from"] == [{"identity": source.identity_digest, "fidelity": "exact"}]
    assert len({cache.digest, source.digest}) == len({cache.identity_digest, source.identity_digest}) == 2
    facts = describe(recoded)
    assert any("packed as jpeg:95 (JPEG library" in line for line in lines(facts))


def test_views_stay_those_of_the_encoder_that_made_them(
    exact_packed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_encoder", lambda library: "another encoder")
    done = recode(RecodeSettings(exact_packed[0], "small", cache=tmp_path / "small"), say=print)
    source = Cache(exact_packed[0]).manifest
    assert done.manifest.codec["pack"] == done.manifest.identity["codec"]["pack"] == source.codec["pack"]


def test_students_train_from_it_without_images(exact_packed: tuple[Path, Path], recoded: Path, tmp_path: Path) -> None:
    run = train_student(recoded, tmp_path, "cwd", "ld", data=exact_packed[1], epochs=1)
    assert run.trainer.train_loader.proven == (12, 12)
    assert (run.folder / "weights" / "last.pt").exists()


def test_the_teacher_agrees_with_it(recoded: Path, bccd_teacher: Path) -> None:
    found = verify(recoded, teacher=bccd_teacher, pixels=True, sample=24, say=print)
    assert found.ok and (found.pixels_checked, found.targets_checked) == (24, 24) and 0 < found.worst <= 1
    assert "pixels: 24 packed views decoded, 0 differ" in found.lines()


def test_anchors_are_those_of_the_threshold_and_the_labels(exact_packed: tuple[Path, Path], recoded: Path) -> None:
    source, cache = Cache(exact_packed[0]), Cache(recoded)
    for index in range(12):
        scores = source.read(0, index).scores
        assert scores is not None
        passing = SparseLogits(0.01).sent(scores, None)
        assert np.array_equal(sent(cache, index), passing | labelled(source, index))


# -- fewer logits of those that were kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "replayed"])
def test_a_higher_threshold_drops_anchors_but_none_in_labels(
    kind: str, recoded: Path, few_cache: Path, tmp_path: Path
) -> None:
    """From p > .01 to p > .05 those go that lie surely between, by the codes' error, and outside all labelled boxes."""
    source = Cache(recoded if kind == "packed" else few_cache)
    cache = Cache(recode(RecodeSettings(source.path, "tiny", cache=tmp_path / "tiny"), say=print).path)
    assert cache.manifest.codec["logits"] == {"kind": "sparse", "threshold": 0.05, "step": 0.125}
    dropped = 0
    for index in range(12):
        before, after = source.read(0, index), cache.read(0, index)
        assert before.scores is not None and before.boxes is not None and before.sent is not None
        assert after.scores is not None and after.boxes is not None and after.sent is not None
        in_box = labelled(source, index)
        passing = SparseLogits(0.05).sent(before.scores + 0.125 / 2, None)
        assert np.array_equal(after.sent, before.sent & (passing | in_box))
        assert np.array_equal(after.scores[after.sent], before.scores[after.sent])
        assert np.array_equal(after.boxes[after.sent], before.boxes[after.sent])
        tail = before.scores[~after.sent].mean(axis=0, dtype=np.float64).astype(np.float16)
        assert (after.scores[~after.sent] == tail.astype(np.float32)).all(), "the mean of all that are not sent"
        dropped += int(before.sent.sum() - after.sent.sum())
    assert dropped > 0
    sizes = [describe(one.path)["bytes_by_column"]["logits"] for one in (source, cache)]
    assert sizes[1] < sizes[0] and verify_cache(cache.path).ok


def test_the_valuable_region_goes_with_its_store(full_cache: Path, few_cache: Path, tmp_path: Path) -> None:
    """What is left is what an extraction without `vlr` keeps, and what is too near the threshold to tell."""
    done = recode(RecodeSettings(full_cache, store=("features", "logits"), cache=tmp_path / "less"), say=print)
    cache, usual = Cache(done.path), Cache(few_cache)
    for index in range(12):
        more = sent(cache, index) & ~sent(usual, index)
        assert not (sent(usual, index) & ~sent(cache, index)).any() and more.sum() < 10
        scores = cache.read(0, index).scores
        assert scores is not None and SparseLogits(0.01).sent(scores + 0.125 / 2, None)[more].all()
    assert any((sent(Cache(full_cache), index) != sent(cache, index)).any() for index in range(12))


def test_without_labels_logits_are_not_dropped_by_chance(few_cache: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(few_cache, tmp_path / "alone" / "cache"))
    with pytest.raises(MissingFileError, match=r"^no such file: .*gone.yaml"):
        recode(RecodeSettings(path, "tiny", cache=tmp_path / "tiny", data=tmp_path / "gone.yaml"), say=print)
    done = recode(RecodeSettings(path, "small", cache=tmp_path / "small", data=tmp_path / "gone.yaml"), say=print)
    assert done.items == 36, "the same logits need no labels"


def test_labels_of_other_pixels_are_refused(few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = datasets.ViewDataset.sample

    def brighter(self: Any, view: Any, index: int) -> Any:
        sample = stock(self, view, index)
        return replace(sample, pixels=sample.pixels ^ 1)

    monkeypatch.setattr(datasets.ViewDataset, "sample", brighter)
    says = r"view mixed-0000, item 0 \(.*\) has other pixels than the teacher saw, so its labels are not known"
    with pytest.raises(MismatchError, match=says):
        recode(RecodeSettings(few_cache, "tiny", cache=tmp_path / "tiny"), say=print)
    assert not (tmp_path / "tiny").exists()
