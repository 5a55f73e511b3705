"""Caches are listed, deleted and recoded: what is no cache stays, what is coarser is as good as it says."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from student_runs import train_student

from cache_kd.cache import layout, removal
from cache_kd.cache.find import find_caches
from cache_kd.cache.last_use import LAST_USE, last_use, mark_used
from cache_kd.cache.lock import lock_cache
from cache_kd.cache.verify import verify_cache
from cache_kd.cli import caches, main
from cache_kd.errors import CacheKDError, DamagedCacheError, MismatchError, MissingFileError, SettingError
from cache_kd.pipeline import recoding, verification
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import Extracted, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.recoding import RecodeSettings
from cache_kd.structures import View


def run(*words: str | Path, answer: str | None = None) -> Any:
    return CliRunner().invoke(main, list(map(str, words)), input=answer)


@pytest.fixture
def place(few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default place with a complete cache, an unfinished one, a damaged one and a folder of something else."""
    folder = tmp_path / "kd_cache"
    for name in ("whole", "begun", "damaged"):
        shutil.copytree(few_cache, folder / name, ignore=shutil.ignore_patterns(LAST_USE))
    (folder / "begun" / "manifest.json").unlink()
    (folder / "damaged" / "manifest.json").write_text("{")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_text("a")
    monkeypatch.setenv("CACHE_KD_CACHE", str(folder))
    return folder


# -- list -------------------------------------------------------------------------------------------------------------


def test_caches_are_listed_with_what_they_hold(place: Path) -> None:
    mark_used(place / "whole")
    facts = {Path(row["path"]).name: row for row in json.loads(run("list", "--json").stdout)}
    assert set(facts) == {"whole", "begun", "damaged"}
    whole, begun = facts["whole"], facts["begun"]
    assert whole["complete"] and not begun["complete"] and not facts["damaged"]["complete"]
    assert (whole["teacher"], whole["fidelity"], whole["images"], whole["views"]) == ("best.pt", "default", 12, 3)
    assert Path(whole["data"]).name == "bccd.yaml"
    assert abs(whole["last_use"] - time.time()) < 60 and begun["last_use"] is None
    assert (begun["teacher"], begun["fidelity"], begun["images"]) == (None, "default", 12)
    files = [path for path in (place / "whole").rglob("*") if path.is_file()]
    assert whole["bytes"] == sum(path.stat().st_size for path in files)
    assert run("list", place, "--json").stdout == run("list", "--json").stdout
    text = run("list").stdout
    states = {line.split()[0]: line.split()[-1] for line in text.splitlines()[1:-1]}
    assert states == {"whole": "complete", "begun": "unfinished", "damaged": "damaged"}
    assert "12 x 3" in text and text.splitlines()[-1].startswith(f"3 caches in {place}, ")


def test_no_caches_are_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("list").stdout == "no caches in kd_cache; make one: cache-kd extract --teacher best.pt\n"
    assert json.loads(run("list", "--json").stdout) == []
    done = run("list", "missing")
    assert (done.exit_code, done.stderr) == (
        1,
        "cache-kd: no folder missing; name one that holds caches, or none: kd_cache\n",
    )


def test_training_notes_the_last_use_and_nothing_else_changes(own_cache: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in own_cache.rglob("*") if path.is_file()}
    assert last_use(own_cache) is None
    train_student(own_cache, tmp_path / "runs", "cwd", epochs=1)
    used = last_use(own_cache)
    assert used is not None and abs(used - time.time()) < 300
    after = {path: path.read_bytes() for path in own_cache.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {own_cache / LAST_USE} and after[own_cache / LAST_USE] == b""
    assert {path: after[path] for path in before} == before
    report = verify_cache(own_cache)
    assert report.ok and report.notes == ()


def test_a_last_use_that_cannot_be_noted_is_no_matter(own_cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (own_cache / LAST_USE).symlink_to(target)
    mark_used(own_cache)
    assert not target.exists(), "a link in a cache of others was followed"
    (own_cache / LAST_USE).unlink()
    (own_cache / LAST_USE).mkdir()
    mark_used(own_cache)
    assert last_use(own_cache) is None


# -- rm ---------------------------------------------------------------------------------------------------------------


def test_a_cache_is_deleted_and_its_bytes_are_said(place: Path) -> None:
    size = removal.folder_bytes(place / "whole")
    (done,) = json.loads(run("rm", place / "whole", "--yes", "--json").stdout)
    assert done == {"cache": str(place / "whole"), "bytes": size} and size > 100_000
    assert sorted(path.name for path in place.iterdir()) == ["begun", "damaged", "photos"]
    assert "damaged: deleted, " in run("rm", place / "damaged").stdout
    assert not (place / "damaged").exists()


def test_what_is_no_cache_stays(place: Path) -> None:
    (place / "link").symlink_to(place / "whole", target_is_directory=True)
    for name, says in (
        ("photos", "is not a cache: it has no zarr.json"),
        ("missing", "no cache at "),
        ("link", "is a link, which is never followed; name the cache's own folder"),
        (".", "is not a cache: it has no zarr.json"),
    ):
        done = run("rm", place / "whole", place / name, "--yes")
        assert done.exit_code == 1 and done.stderr.count("\n") == 1 and says in done.stderr
        assert (place / "whole" / "manifest.json").exists(), "nothing is deleted unless all may be"
    assert (place / "photos" / "a.jpg").exists()


def test_links_inside_are_not_followed_and_other_files_stay(place: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    whole = place / "whole"
    shutil.rmtree(whole / "views")
    (whole / "views").symlink_to(outside, target_is_directory=True)
    (whole / "units" / "more").symlink_to(outside, target_is_directory=True)
    (whole / "notes.txt").write_text("mine")
    done = run("rm", whole, "--yes")
    assert done.exit_code == 0 and "files that are not the cache's are still there" in done.stdout
    assert (outside / "kept.txt").exists()
    assert [path.name for path in whole.iterdir()] == ["notes.txt"]


def test_a_cache_that_is_being_written_stays(place: Path) -> None:
    lock = lock_cache(place / "begun")
    try:
        done = run("rm", place / "begun", "--yes")
        assert done.exit_code == 1 and "is writing" in done.stderr and done.stderr.count("\n") == 1
        said = run("rm", "--unfinished", "--yes")
        assert said.exit_code == 0 and "left: another extraction is writing" in said.stdout
        assert (place / "begun" / "zarr.json").exists()
    finally:
        lock.release()
    assert "begun: deleted" in run("rm", "--unfinished", "--yes").stdout
    assert sorted(path.name for path in place.iterdir()) == ["damaged", "photos", "whole"]
    assert run("rm", "--unfinished", "--yes").stdout == f"no unfinished cache in {place}\n"


def test_on_a_terminal_it_is_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(caches.sys, "stdin", Terminal())
    asked: list[str] = []
    monkeypatch.setattr(caches.click, "confirm", lambda text, **_: asked.append(text))
    with pytest.raises(SystemExit) as ended:
        main(["rm", str(place / "whole")])
    assert ended.value.code in (0, None) and (place / "whole" / "manifest.json").exists()
    assert len(asked) == 1 and str(place / "whole") in asked[0]
    with pytest.raises(SystemExit):
        main(["rm", str(place / "whole"), "--yes"])
    assert len(asked) == 1 and not (place / "whole").exists()


def test_nothing_named_is_a_line() -> None:
    done = run("rm")
    assert (done.exit_code, done.stderr) == (
        1,
        "cache-kd: no cache named; name some: cache-kd rm CACHE, or all unfinished ones: --unfinished\n",
    )


def test_a_kill_leaves_an_unfinished_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(_: Path) -> None:
        raise Killed

    monkeypatch.setattr(removal, "discard", die)
    with removal.CacheRemoval(place / "whole") as doomed, pytest.raises(Killed, match=r"^$"):
        doomed.delete()
    with pytest.raises(DamagedCacheError, match="an unfinished cache"):
        Cache(place / "whole")
    monkeypatch.undo()
    (found,) = (cache for cache in find_caches(place) if cache.path.name == "whole")
    assert not found.complete


# -- recode -----------------------------------------------------------------------------------------------------------


def recode(source: Path, out: Path, fidelity: str | None = None, **options: Any) -> Extracted:
    return recoding.recode(RecodeSettings(source, fidelity, cache=out, **options), say=print)


def test_a_recoded_cache_holds_the_same_views_at_a_coarser_fidelity(few_cache: Path, tmp_path: Path) -> None:
    source = Cache(few_cache)
    done = recode(few_cache, tmp_path / "small", "small", jobs=2)
    cache = Cache(done.path)
    assert verify_cache(done.path).ok and done.items == 36
    assert cache.num_bytes < source.num_bytes
    assert (cache.views, cache.images) == (source.views, source.images)
    assert cache.manifest.codec["features"] == {"kind": "pair", "step": 0.3}
    columns = ("pixel_hash", "hold_stats", "logits", "score_map")
    for view, index in ((View("mixed", 1), 7), (View("plain", 0), 3)):
        before, after = (one.reader.read(view, index, columns) for one in (source, cache))
        assert all(np.array_equal(before[name], after[name]) for name in columns)
        features = [
            source.codec.decode_one(one.reader.read(view, index, ("features", "feature_peaks", "feature_tables")))
            for one in (source, cache)
        ]
        for fine, coarse in zip(*(said.features or () for said in features), strict=True):
            error = float((fine - coarse).abs().max())
            assert 0 < error <= 0.35 * float(fine.std()) + float(fine.max() - fine.min()) / 255
    arrays = source.manifest.arrays
    assert cache.manifest.arrays == arrays and cache.manifest.recipe == source.manifest.recipe


def test_it_is_no_cache_of_an_extraction_at_that_fidelity(
    few_cache: Path, few_images: Path, bccd_teacher: Path, tmp_path: Path
) -> None:
    done = recode(few_cache, tmp_path / "small", "small")
    settings = ExtractSettings(
        bccd_teacher, few_images, tmp_path / "small", views=2, imgsz=64, batch=4, device="cpu", fidelity="small"
    )
    with pytest.raises(MismatchError, match=r"is a cache of something else \(recoded_from"):
        extract(settings)
    assert Cache(done.path).manifest.identity_digest != Cache(few_cache).manifest.identity_digest


def test_the_teacher_agrees_with_it_within_the_bounds_of_both(
    few_cache: Path, few_images: Path, bccd_teacher: Path, tmp_path: Path
) -> None:
    recode(few_cache, tmp_path / "small", "small")
    recode(tmp_path / "small", tmp_path / "tiny", "tiny")
    report = verification.verify(tmp_path / "tiny", teacher=bccd_teacher, data=few_images, pixels=True, say=print)
    assert report.ok and 0 < report.worst <= 1 and report.pixels_checked == 36
    chain = Cache(tmp_path / "tiny").manifest.identity["recoded_from"]
    assert [made["fidelity"] for made in chain] == ["default", "small"]


def test_students_train_from_it(few_cache: Path, few_images: Path, tmp_path: Path) -> None:
    recode(few_cache, tmp_path / "small", "small")
    run = train_student(tmp_path / "small", tmp_path / "runs", "cwd", "ld", data=few_images, epochs=1)
    assert (run.folder / "weights" / "last.pt").exists()


def test_stores_can_be_dropped(few_cache: Path, tmp_path: Path) -> None:
    done = recode(few_cache, tmp_path / "logits", store=("logits",))
    cache = Cache(done.path)
    names = {column.name for column in cache.manifest.columns}
    assert names == {"logits", "hold_stats", "pixel_hash"} and cache.manifest.codec["fidelity"] == "default"
    view = View("mixed", 0)
    assert np.array_equal(*(one.reader.read_row(view, "logits", 5) for one in (cache, Cache(few_cache))))
    assert verify_cache(done.path).ok


def test_layers_go_with_the_features(full_cache: Path, tmp_path: Path) -> None:
    small = Cache(recode(full_cache, tmp_path / "small", "small").path)
    assert [tap.name for tap in small.manifest.head.layers] == ["C3", "C4", "6", "8", "12.cv1"]
    assert small.num_bytes < Cache(full_cache).num_bytes
    bare = Cache(recode(full_cache, tmp_path / "bare", store=("logits",)).path)
    assert bare.manifest.head.layers == () and bare.manifest.codec["layers"] == []


def test_from_exact_the_anchors_in_labels_are_those_of_an_extraction(
    exact_cache: Path, few_images: Path, bccd_teacher: Path, tmp_path: Path
) -> None:
    """The teacher's logits are in half precision there; which anchors lie in boxes, the data set says."""
    cache = Cache(
        recode(exact_cache, tmp_path / "default", "default", data=few_images, store=("features", "logits")).path
    )
    layers = ("C3", "C4", "6", "8", "12.cv1")
    settings = ExtractSettings(
        bccd_teacher, few_images, tmp_path / "direct", 1, 1, imgsz=64, batch=4, device="cpu", workers=0, taps=layers
    )
    direct = Cache(extract(settings).path)
    agree = []
    for index in range(12):
        mine, theirs = cache.read(0, index), direct.read(0, index)
        assert mine.sent is not None and theirs.sent is not None
        agree.append(float((mine.sent == theirs.sent).mean()))
        assert 0 < mine.sent.sum() < len(mine.sent)
    assert np.mean(agree) > 0.995


@pytest.mark.parametrize(
    ("fidelity", "store", "says"),
    [
        (
            "safe",
            None,
            r"has fidelity default, --fidelity safe is finer, .* allowed: small, tiny; finer ones: cache-kd ex",
        ),
        ("exact", None, r"--fidelity exact is finer"),
        (
            "default",
            None,
            r"has fidelity default and features, logits already; choose a coarser --fidelity \(small, tiny\)",
        ),
        (None, None, r"already; choose a coarser"),
        ("fine", None, r"--fidelity 'fine' is unknown; known: "),
        (
            "small",
            ("features", "vlr"),
            r"has no vlr; --store may name some of features, logits; others: cache-kd extract",
        ),
        ("small", ("maps",), r"--store 'maps' is unknown"),
    ],
)
def test_what_cannot_come_out_coarser_is_refused(
    few_cache: Path, tmp_path: Path, fidelity: str | None, store: tuple[str, ...] | None, says: str
) -> None:
    with pytest.raises(SettingError, match=says):
        recode(few_cache, tmp_path / "out", fidelity, store=store)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_or_missing_source_is_refused(own_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no cache at"):
        recode(tmp_path / "nothing", tmp_path / "out", "small")
    with pytest.raises(CacheKDError, match="is a cache of something else"):
        recode(own_cache, own_cache, "small")
    (own_cache / "manifest.json").unlink()
    with pytest.raises(DamagedCacheError, match="an unfinished cache"):
        recode(own_cache, tmp_path / "out", "small")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_recoding_goes_on(few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recode(few_cache, tmp_path / "whole", "small")
    monkeypatch.setattr(layout, "MAX_SAMPLES", 4)

    def stop(done: int, items: int) -> None:
        assert items in (36, 24)
        if done == 12:
            raise KeyboardInterrupt

    path = tmp_path / "small"
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        recoding.recode(RecodeSettings(few_cache, "small", cache=path), say=print, progress=stop)
    assert not (path / "manifest.json").exists() and len(list((path / "units").glob("*.json"))) == 3
    kept = {file: file.stat().st_mtime_ns for file in (path / "units").glob("*.json")}
    done = recode(few_cache, path, "small")
    assert done.items == 24 and all(file.stat().st_mtime_ns == moment for file, moment in kept.items())
    assert verify_cache(path).ok
    view = View("mixed", 1)
    same = (Cache(one).reader.read_row(view, "features", 11) for one in (path, whole.path))
    assert np.array_equal(*same)


def test_the_command_makes_it_in_the_default_place(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = json.loads(run("recode", few_cache, "--fidelity", "tiny", "--json").stdout)
    name = Path(facts["cache"])
    assert (name.parent, name.name[:6], len(name.name)) == (Path("kd_cache"), "cache-", 14)
    assert facts["bytes"] == Cache(name).num_bytes and facts["items_extracted"] == 36
    again = json.loads(run("recode", few_cache, "--fidelity", "tiny", "--json").stdout)
    assert (again["cache"], again["items_extracted"], again["digest"]) == (facts["cache"], 0, facts["digest"])
    assert os.path.samefile(name, tmp_path / name)
