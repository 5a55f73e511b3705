"""Whatever is wrong with what the user gives: one line that says what to do, an exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import refusals
import torch
import yaml
from refusals import QUICK, SMALL, Refused, run
from small_inputs import build_model, save_model, small_data

work, refused = refusals.work, refusals.refused


@pytest.fixture(scope="module")
def teacher(test_data: Path) -> Path:
    return test_data / "weights" / "yolov8s-bccd.pt"


@pytest.fixture
def data(test_data: Path, tmp_path: Path) -> Path:
    """A data file of four images that a test may change."""
    return small_data(test_data / "data" / "bccd", tmp_path / "data", train=4)


# -- teachers ---------------------------------------------------------------------------------------------------------


def test_a_missing_teacher_is_named(refused: Refused, few_images: Path) -> None:
    line = refused("extract", "--teacher", "gone.pt", "--data", few_images, *SMALL)
    assert "teacher gone.pt: no such file" in line and "--teacher best.pt" in line


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(range(256)) * 20),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("epochs: 3\n"),
        write_zip,
    ],
    ids=["random", "empty", "text", "zip"],
)
def test_a_teacher_that_is_no_checkpoint_is_refused(
    refused: Refused, few_images: Path, tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path / "best.pt")
    line = refused("extract", "--teacher", tmp_path / "best.pt", "--data", few_images, *SMALL)
    assert f"teacher {tmp_path / 'best.pt'} is not a usable Ultralytics checkpoint: " in line


def test_a_teacher_must_be_a_pt_file(refused: Refused, few_images: Path) -> None:
    line = refused("extract", "--teacher", few_images, "--data", few_images, *SMALL)
    assert "is not a checkpoint; allowed: a file ending in .pt" in line


def test_a_teacher_of_another_task_is_refused(refused: Refused, few_images: Path, tmp_path: Path) -> None:
    file = save_model(build_model("yolov8n-seg.yaml"), tmp_path / "seg.pt", task="segment")
    line = refused("extract", "--teacher", file, "--data", few_images, *SMALL)
    assert f"teacher {file} has the head Segment (task segment); allowed: Detect" in line


# -- data files -------------------------------------------------------------------------------------------------------


def test_a_missing_data_file_is_named(refused: Refused, teacher: Path, few_cache: Path) -> None:
    assert "no such file: gone.yaml" in refused("extract", "--teacher", teacher, "--data", "gone.yaml", *SMALL)
    line = refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--data", "gone.yaml", *QUICK)
    assert "no such file: gone.yaml" in line


def test_a_recorded_data_file_that_is_not_found_is_asked_for(refused: Refused, teacher: Path) -> None:
    line = refused("extract", "--teacher", teacher, *SMALL)
    assert "data file 'bccd.yaml' of teacher" in line and "name it: --data my.yaml" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("val: images/val\nnames: [a]\n", "has no `train:` entry; add the folder of training images"),
        ("train: images/train\nnames: [a]\n", "has no `val:` entry"),
        ("train: images/train\nval: images/val\n", "has neither `names:` nor `nc:`"),
        ("train: [\n", "is not a YAML file"),
        ("- a\n- b\n", "must hold `key: value` lines, it holds a list"),
        ("train: images/nowhere\nval: images/val\nnames: [RBC, WBC, Platelets]\n", "images/nowhere"),
        ("train: labels/train\nval: images/val\nnames: [RBC, WBC, Platelets]\n", "holds no images"),
    ],
    ids=["no train", "no val", "no names", "no yaml", "list", "missing folder", "no images"],
)
def test_a_data_file_that_cannot_be_used_says_why(
    refused: Refused, teacher: Path, data: Path, content: str, says: str
) -> None:
    data.write_text(content)
    line = refused("extract", "--teacher", teacher, "--data", data, *SMALL)
    assert says in line and data.name in line


def test_unreadable_images_are_named_skipped_and_recorded(teacher: Path, data: Path, work: Path) -> None:
    empty, broken, *_ = sorted((data.parent / "images" / "train").iterdir())
    empty.write_bytes(b"")
    broken.write_bytes(b"not an image")
    done = run("extract", "--teacher", teacher, "--data", data, *SMALL, "--cache", "cache")
    assert done.exit_code == 0
    for image in (empty, broken):
        assert sum("skipped as Ultralytics would" in line and str(image) in line for line in done.stdout.splitlines())
    recorded = json.loads((work / "cache" / "data.json").read_text())
    assert [text.partition(":")[0] for text in recorded["skipped"]] == [empty.name, broken.name]
    assert len(recorded["images"]) == 2
    facts = json.loads(run("inspect", "cache", "--json").stdout)
    assert (facts["images"], facts["skipped"]) == (2, recorded["skipped"])
    assert f"2 unreadable images skipped: {empty.name}" in run("inspect", "cache").stdout
    trained = run("train", "--student", "yolov8n.yaml", "--cache", "cache", "--loss", "cwd", *QUICK)
    assert trained.exit_code == 0, trained.stderr


def test_a_data_set_without_a_readable_image_is_refused(refused: Refused, teacher: Path, data: Path) -> None:
    for image in (data.parent / "images" / "train").iterdir():
        image.write_bytes(b"")
    line = refused("extract", "--teacher", teacher, "--data", data, *SMALL)
    assert "images/train" in line


# -- options of the extraction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--views", "0", "--plain-views", "0"], "--views 0 --plain-views 0 leaves nothing to extract"),
        (["--views", "-1"], "--views -1; allowed: 0 or more"),
        (["--batch", "0"], "--batch 0; allowed: 1 or more"),
        (["--imgsz", "100"], "--imgsz 100; allowed: multiples of 32, for example 96"),
        (["--imgsz", "0"], "--imgsz 0; allowed: multiples of 32"),
        (["--workers", "-1"], "--workers -1; allowed: 0 or more"),
        (["--fidelity", "defualt"], "did you mean 'default'?"),
        (["--store", "feature"], "did you mean 'features'?"),
        (["--store", ""], "--store is empty"),
        (["--precision", "bf16"], "--precision 'bf16'; allowed: fp32, fp16"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["mosaic"], "'mosaic' is not of the form KEY=VALUE, for example "),
        (["mosaic="], "'mosaic=' is not of the form KEY=VALUE"),
        (["mosaic=1", "mosaic=0"], "mosaic is given twice"),
        (["mosiac=1"], "did you mean 'mosaic'?"),
        (["mosaic=2"], "mosaic=2"),
        (["epochs=3"], "epochs=3 is not an augmentation key"),
        (["--import", "gone.py"], "--import gone.py: no such file"),
        (["--store", "vlr"], "give it with them: --store logits,vlr"),
        (["--taps", "P3,P3"], "--taps P3,P3 names a layer twice; name each once"),
        (["--taps", "99"], "has no layer '99'; allowed: C3, C4, C5 for the backbone's stages, a number from 0 to 21"),
        (["--taps", "C4,C9"], "has no layer 'C9'; allowed: C1, C2, C3, C4, C5 for the backbone's stages"),
        (["--taps", "x"], "has no layer 'x'; allowed: C3, C4, C5"),
        (["--taps", "22"], "has no layer '22'; allowed: C3, C4, C5"),
        (["--taps", "6.m"], "layer '6.m' of teacher"),
        (["--taps", "C4", "--store", "logits"], "--taps keeps maps; give it with --store features"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_option_with_a_wrong_value_is_refused(
    refused: Refused, teacher: Path, few_images: Path, words: list[str], says: str
) -> None:
    assert says in refused("extract", "--teacher", teacher, "--data", few_images, *SMALL, *words)


def test_a_gpu_that_is_not_there_is_refused(refused: Refused, teacher: Path, few_images: Path, few_cache: Path) -> None:
    quick = [word for word in QUICK if not word.startswith("device")]
    for name in ("cuda:99", "99") if torch.cuda.is_available() else ("cuda", "0"):
        line = refused("extract", "--teacher", teacher, "--data", few_images, *SMALL, "--device", name)
        assert f"--device {name}: " in line and "allowed: cpu" in line
        line = refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, *quick, f"device={name}")
        assert f"device={name} cannot be used here; allowed: cpu" in line


@pytest.mark.parametrize("inside", ["images/train", "images/train/deeper", "labels/train"])
def test_a_cache_inside_the_data_set_is_refused(refused: Refused, teacher: Path, data: Path, inside: str) -> None:
    line = refused("extract", "--teacher", teacher, "--data", data, *SMALL, "--cache", data.parent / inside)
    assert f"--cache {data.parent / inside} lies inside the data set" in line


def test_a_cache_around_the_data_set_is_refused(refused: Refused, teacher: Path, data: Path) -> None:
    line = refused("extract", "--teacher", teacher, "--data", data, *SMALL, "--cache", data.parent)
    assert "holds other files" in line and "give a new or empty folder" in line


def test_a_file_is_no_place_for_a_cache(refused: Refused, teacher: Path, data: Path, work: Path) -> None:
    (work / "cache").write_text("a file")
    assert "is a file" in refused("extract", "--teacher", teacher, "--data", data, *SMALL, "--cache", "cache")


def test_a_cache_of_other_settings_is_left_alone(
    refused: Refused, teacher: Path, few_images: Path, few_cache: Path
) -> None:
    line = refused("extract", "--teacher", teacher, "--data", few_images, *SMALL, "--seed", "9", "--cache", few_cache)
    assert "is a cache of something else (seed: 0 there, 9 wanted)" in line


@pytest.mark.parametrize("place", [[], ["--cache", "here/and/there"]])
def test_a_disk_too_small_is_refused_before_anything_is_written(
    refused: Refused, teacher: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch, place: list[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    line = refused("extract", "--teacher", teacher, "--data", few_images, *SMALL, *place)
    assert "its disk has 1.0 kB free; choose fewer --views, --fidelity small or tiny, or another --cache" in line


# -- caches -----------------------------------------------------------------------------------------------------------


def test_no_cache_is_asked_for(refused: Refused) -> None:
    line = refused("train", "--student", "yolov8n.yaml", *QUICK)
    assert "no cache in " in line and "make one: cache-kd extract --teacher best.pt" in line


@pytest.mark.parametrize("command", [["train", "--student", "yolov8n.yaml", "--cache"], ["inspect"], ["verify"]])
def test_a_folder_that_is_no_cache_is_refused(refused: Refused, work: Path, command: list[str]) -> None:
    (work / "empty").mkdir()
    for folder in ("empty", "gone"):
        assert folder in refused(*command, folder)


@pytest.mark.parametrize("named", [True, False])
def test_an_unfinished_cache_is_refused_by_name(refused: Refused, few_cache: Path, work: Path, named: bool) -> None:
    unfinished = Path(shutil.copytree(few_cache, work / "kd_cache" / "unfinished"))
    (unfinished / "manifest.json").unlink()
    place = ["--cache", "kd_cache/unfinished"] if named else []
    line = refused("train", "--student", "yolov8n.yaml", *place, *QUICK)
    assert "kd_cache/unfinished" in line and "cache-kd extract" in line


def test_the_newest_of_several_caches_is_taken_and_said(few_cache: Path, work: Path) -> None:
    for seconds, name in ((2000, "old"), (4000, "new"), (3000, "middle")):
        shutil.copytree(few_cache, work / "kd_cache" / name)
        os.utime(work / "kd_cache" / name / "manifest.json", (seconds, seconds))
    done = run("train", "--student", "yolov8n.yaml", "--loss", "cdw", *QUICK)
    assert "cache: kd_cache/new, the newest of 3; another one: --cache DIR" in done.stdout


# -- data that changed ------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(few_images: Path, tmp_path: Path) -> Path:
    """A copy of the images that the cache was made from."""
    folder = tmp_path / "moved"
    shutil.copytree(few_images.parent, folder, ignore=shutil.ignore_patterns("*.cache"))
    return folder / few_images.name


def test_a_changed_image_is_refused_by_name(refused: Refused, few_cache: Path, moved: Path) -> None:
    first, second, *_ = sorted((moved.parent / "images" / "train").iterdir())
    shutil.copyfile(first, second)
    line = refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--data", moved, *QUICK)
    assert f"the data set is not the one that the teacher saw: the image of item 1 ({second.name}) changed: " in line
    assert "restore it, or extract again: cache-kd extract" in line


def test_a_changed_label_is_refused_by_name(refused: Refused, few_cache: Path, moved: Path) -> None:
    label = sorted((moved.parent / "labels" / "train").iterdir())[2]
    label.write_text("0 0.5 0.5 0.2 0.2\n")
    line = refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--data", moved, *QUICK)
    assert f"the label of item 2 ({label.stem}.jpg) changed: content " in line


def test_a_missing_image_is_refused_by_name(refused: Refused, few_cache: Path, moved: Path) -> None:
    gone = sorted((moved.parent / "images" / "train").iterdir())[3]
    gone.unlink()
    line = refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--data", moved, *QUICK)
    assert f"12 usable images there, 11 now; image {gone.name} (item 3 there) is gone; restore it" in line


# -- students ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "says"),
    [
        ("yolov8n-p2.yaml", "strides [4, 8, 16, 32], the cache's targets have [8, 16, 32]"),
        ("yolov8n-p6.yaml", "strides [8, 16, 32, 64], the cache's targets have [8, 16, 32]"),
        ("yolov8n-seg.yaml", "has the head Segment"),
        ("yolov8n", "--student yolov8n; allowed: a model YAML as yolov8n.yaml, or a checkpoint ending in .pt"),
        ("yolov99n.yaml", "--student yolov99n.yaml: no such file"),
        ("gone.pt", "--student gone.pt: no such file"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(refused: Refused, few_cache: Path, student: str, says: str) -> None:
    assert says in refused("train", "--student", student, "--cache", few_cache, *QUICK)


@pytest.mark.parametrize("strides", ["two levels", "other order"])
def test_a_student_with_other_levels_is_refused(
    refused: Refused, few_cache: Path, tmp_path: Path, strides: str
) -> None:
    from ultralytics.nn.tasks import yaml_model_load

    content = yaml_model_load("yolov8n.yaml")
    content["head"][-1][0] = [15, 18] if strides == "two levels" else [21, 18, 15]
    content.pop("yaml_file")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    line = refused("train", "--student", tmp_path / "mine.yaml", "--cache", few_cache, *QUICK)
    assert "the student's head has strides" in line


def test_a_student_that_is_no_checkpoint_is_refused(refused: Refused, few_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "student.pt").write_bytes(bytes(range(256)) * 20)
    line = refused("train", "--student", tmp_path / "student.pt", "--cache", few_cache, *QUICK)
    assert str(tmp_path / "student.pt") in line


# -- settings of the training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("mosaic=0.5", "mosaic=0.5 (the cache has "),
        ("degrees=5", "degrees=5 (the cache has 0.0)"),
        ("imgsz=96", "imgsz=96 (the cache has 64)"),
        ("multi_scale=0.5", "multi_scale=0.5 (allowed: 0)"),
        ("rect=True", "rect=True (allowed: False)"),
        ("cache=disk", "cache='disk' (writes .npy files beside the images; allowed: ram, False)"),
    ],
)
def test_a_setting_that_changes_pixels_is_refused(refused: Refused, few_cache: Path, setting: str, says: str) -> None:
    line = refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, *QUICK, setting)
    assert says in line and "settings that change pixels are fixed by the cache" in line
    assert "cache-kd extract again" in line


def test_several_such_settings_are_named_together(refused: Refused, few_cache: Path) -> None:
    line = refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, *QUICK, "mosaic=0.5", "rect=True")
    assert "mosaic=0.5" in line and "rect=True" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["epoch=3"], "'epoch' is not a valid YOLO argument. Similar arguments are i.e. ['epochs=100'"),
        (["lr0=fast"], "lr0"),
        (["patience"], "'patience' is not of the form KEY=VALUE"),
        (["patience=3", "patience=4"], "patience is given twice"),
        (["--verify-pixels", "some"], "--verify-pixels 'some'; allowed: first, all, off"),
        (["resume=gone/last.pt"], "resume=gone/last.pt: no such checkpoint"),
        (["freeze=99"], "freeze=99 leaves nothing of the student to train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_setting_that_ultralytics_would_not_take_is_refused(
    refused: Refused, few_cache: Path, words: list[str], says: str
) -> None:
    assert says in refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, *QUICK, *words)


# -- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["extract"], "Missing option '--teacher'"),
        (["extract", "--teacher", "best.pt", "--views", "many"], "'many' is not a valid integer"),
        (["extract", "--teacher", "best.pt", "--view", "3"], "--views"),
        (["extract", "--teacher", "best.pt", "--tap", "C4"], "--taps"),
        (["train", "--student", "yolov8n.yaml", "--balance", "much"], "'much' is not a valid float"),
        (["train", "--student", "yolov8n.yaml", "--threads", "0"], "--threads"),
        (["train", "epochs=3"], "--student"),
        (["inspect"], "CACHE"),
        (["distil"], "distil"),
        (["--quiet"], "--quiet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_usage_is_one_line_and_code_2(refused: Refused, words: list[str], says: str) -> None:
    line = refused(*words, code=2)
    assert says in line and "--help" in line


def test_debug_shows_where_an_error_came_from() -> None:
    done = run("--debug", "extract", "--teacher", "gone.pt", *SMALL)
    assert type(done.exception).__name__ == "MissingFileError"
