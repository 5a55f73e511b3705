"""What no target depends on makes no other cache: places, names, times, how a file was saved, how it is run."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from identity_inputs import rename, saved_with, settings
from student_runs import FAST

from cache_kd.pipeline import versions
from cache_kd.pipeline.extraction import Extracted, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.preparation import prepare
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import train
from cache_kd.pipeline.verification import verify
from cache_kd.pipeline.versions import PIXEL_PACKAGES

# -- what changes nothing ---------------------------------------------------------------------------------------------


def moved(data: Path) -> Path:
    return data.parent.rename(data.parent.parent / "ein anderer Ordner") / data.name


def copied(data: Path) -> Path:
    return Path(shutil.copytree(data.parent, data.parent.parent / "deep" / "er")) / data.name


def linked(data: Path) -> Path:
    link = data.parent.parent / "link"
    link.symlink_to(data.parent, target_is_directory=True)
    return link / data.name


def touched(data: Path) -> Path:
    for path in data.parent.rglob("*"):
        os.utime(path, (1, 1))
    return data


def renamed_in_order(data: Path) -> Path:
    for index in range(12):
        rename(data, index, f"{index:04d}")
    return data


def other_folder(data: Path) -> Path:
    for kind in ("images", "labels"):
        (data.parent / kind / "train").rename(data.parent / kind / "learn")
    data.write_text(data.read_text().replace("images/train", "images/learn"))
    return data


def reformatted(data: Path) -> Path:
    held = yaml.safe_load(data.read_text())
    text = f"# cells\nnames: [{', '.join(held['names'].values())}]\nval: {held['val']}\ntrain: '{held['train']}'\n"
    data.write_text(text)
    return data.rename(data.with_name("cells.yaml"))


def with_other_files(data: Path) -> Path:
    (data.parent / "images" / "train" / "notes.txt").write_text("not an image")
    (data.parent / "images" / "train" / "thumbs.npy").write_bytes(b"x")
    return data


HARMLESS = (moved, copied, linked, touched, renamed_in_order, other_folder, reformatted, with_other_files)


def assert_same(done: Extracted, few_cache: Path) -> None:
    before = Cache(few_cache).manifest
    assert done.items == 0
    assert (done.manifest.identity_digest, done.manifest.digest) == (before.identity_digest, before.digest)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_a_data_set_moved_or_renamed_is_the_same(
    few_cache: Path, own_cache: Path, bccd_teacher: Path, own_data: Path, change: Callable[[Path], Path]
) -> None:
    data = change(own_data)
    pixels = Cache(few_cache).pixels(1, 7)
    assert (Cache(own_cache, data=data).pixels(1, 7) == pixels).all()  # what train compares, too
    assert_same(extract(settings(bccd_teacher, data, own_cache)), few_cache)
    assert verify(own_cache, pixels=True, data=data, say=print).ok


@pytest.mark.usefixtures("loaded_once")
def test_topping_up_after_a_renaming_leaves_a_whole_cache(
    few_cache: Path, own_cache: Path, bccd_teacher: Path, own_data: Path
) -> None:
    done = extract(settings(bccd_teacher, renamed_in_order(own_data), own_cache, plain_views=2))
    assert done.items == 12 and len(done.manifest.views) == 4
    assert done.manifest.identity_digest == Cache(few_cache).manifest.identity_digest
    assert Cache(own_cache).images == Cache(few_cache).images, "the names of the first extraction stay"
    assert verify(own_cache, pixels=True, data=own_data, say=print).ok


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    "changes", [{"batch": 3}, {"workers": 2}, {"device": "cpu:0"}, {"batch": 12, "views": 1}], ids=str
)
def test_how_it_is_run_does_not_count(
    few_images: Path, few_cache: Path, own_cache: Path, bccd_teacher: Path, changes: dict[str, Any]
) -> None:
    assert_same(extract(settings(bccd_teacher, few_images, own_cache, **changes)), few_cache)


def test_a_cache_moved_and_renamed_is_the_same(
    few_images: Path, few_cache: Path, own_cache: Path, bccd_teacher: Path, tmp_path: Path
) -> None:
    place = own_cache.rename(tmp_path / "ein anderer Name")
    assert_same(extract(settings(bccd_teacher, few_images, place)), few_cache)
    link = tmp_path / "link"
    link.symlink_to(place, target_is_directory=True)
    assert_same(extract(settings(bccd_teacher, few_images, link)), few_cache)


def optimizer_state(stored: dict[str, Any]) -> None:
    stored.update(optimizer={"state": {0: {"momentum_buffer": torch.ones(3)}}}, epoch=7, best_fitness=0.5, date="now")


def other_arguments(stored: dict[str, Any]) -> None:
    stored["train_args"] = {**stored["train_args"], "epochs": 999, "lr0": 0.5, "name": "other", "data": "gone.yaml"}
    stored["model"].args = {"epochs": 999}


def single_precision(stored: dict[str, Any]) -> None:
    stored["model"].float()


def after_use(stored: dict[str, Any]) -> None:
    """A model that was trained on or predicted with last."""
    model = stored["model"].float().train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()(torch.zeros(1, 3, 96, 64))
    model.half().train()


SAVED = (optimizer_state, other_arguments, single_precision, after_use)


@pytest.mark.parametrize("change", SAVED, ids=lambda change: change.__name__)
def test_a_teacher_saved_again_is_the_same(
    few_images: Path,
    few_cache: Path,
    own_cache: Path,
    bccd_teacher: Path,
    tmp_path: Path,
    change: Callable[[Any], None],
) -> None:
    other = saved_with(bccd_teacher, tmp_path / "renamed.pt", change)
    assert other.read_bytes() != bccd_teacher.read_bytes()
    assert_same(extract(settings(other, few_images, own_cache)), few_cache)
    assert verify(own_cache, teacher=other, sample=1, data=few_images, say=print).ok


@pytest.mark.usefixtures("loaded_once")
def test_the_default_place_finds_a_cache_under_any_name(
    few_cache: Path, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CACHE_KD_CACHE", raising=False)
    shutil.copytree(few_cache, tmp_path / "kd_cache" / "mine")
    shutil.copytree(few_cache, tmp_path / "kd_cache" / "other")
    (tmp_path / "kd_cache" / "other" / "zarr.json").unlink()
    data = reformatted(own_data)
    done = extract(settings(Path("renamed.pt"), data, None))
    assert done.path == Path("kd_cache/mine")
    assert_same(done, few_cache)
    job = prepare(settings(Path("renamed.pt"), data, None, seed=1), print)
    job.writer.close()
    assert re.fullmatch(r"kd_cache/cells-renamed-\w{8}", str(job.path))


# -- other versions ---------------------------------------------------------------------------------------------------


def test_training_says_that_versions_differ_and_what_it_proved(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = versions.package_versions(PIXEL_PACKAGES)
    said: list[str] = []

    def run(verify_pixels: str, **changes: Any) -> str:
        monkeypatch.setattr(versions, "package_versions", lambda packages: {**now, **changes})
        caplog.clear()
        chosen = {**FAST, "epochs": 1, "project": str(tmp_path / "runs")}
        with caplog.at_level(logging.WARNING, logger="cache_kd"):
            train(
                TrainSettings("yolov8n.yaml", few_cache, losses=("cwd",), verify_pixels=verify_pixels, settings=chosen),
                say=said.append,
            )
        return caplog.text

    text = run("all", numpy="9.9")
    assert f"other versions than at the extraction may make other pixels: numpy {now['numpy']} then, 9.9 now" in text
    assert said[-1] == "pixels: 12 of 12 items compared with the teacher's, all equal"
    assert "with --verify-pixels off nothing shows it" in run("off", numpy="9.9")
    assert said[-1] == "pixels: 0 of 12 items compared with the teacher's"
    assert "other versions" not in run("first")


def test_verify_says_that_versions_differ(few_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = versions.package_versions(PIXEL_PACKAGES)
    monkeypatch.setattr(versions, "package_versions", lambda packages: {**now, "pillow": None})
    said: list[str] = []
    assert verify(few_cache, pixels=True, say=said.append).ok
    assert said == [f"other versions than at the extraction: pillow {now['pillow']} then, absent now"]
