"""Every change of what a target depends on is refused by name: settings, versions, teacher, images and labels."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from identity_inputs import change_byte, files, flip_bit, named, refusal, rename, saved_with, settings, swap
from student_runs import FAST
from torch import nn

from cache_kd.cli import main
from cache_kd.codecs import fidelity
from cache_kd.codecs.pair_features import PairFeatures
from cache_kd.errors import MismatchError, SettingError
from cache_kd.fingerprint import differences
from cache_kd.pipeline import identity, versions
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import train
from cache_kd.pipeline.verification import verify
from cache_kd.pipeline.versions import PIXEL_PACKAGES
from cache_kd.ultralytics_bridge.settings import check_pixel_settings
from cache_kd.ultralytics_bridge.teacher import Checkpoint, load_teacher
from cache_kd.views.recipe import RECIPE_KEYS, Recipe

SEEN = r"the data set is not the one that the teacher saw: "


# -- what changes it: settings ----------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    **{"hsv_h": 0.1, "hsv_s": 0.1, "hsv_v": 0.1, "degrees": 5.0, "translate": 0.2, "scale": 0.4, "shear": 2.0},
    **{"perspective": 0.0005, "flipud": 0.5, "fliplr": 0.0, "bgr": 0.5, "mosaic": 0.5, "mixup": 0.1, "cutmix": 0.1},
    **{"copy_paste": 0.1, "copy_paste_mode": "mixup", "augmentations": ["Blur"], "single_cls": True, "classes": [0]},
    **{"fraction": 0.5},
}


def test_every_key_of_the_recipe_is_tried() -> None:
    assert set(OTHER) == set(RECIPE_KEYS)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("key", RECIPE_KEYS)
def test_a_change_of_the_recipe_is_refused(few_images: Path, few_cache: Path, bccd_teacher: Path, key: str) -> None:
    recipe = Cache(few_cache).manifest.recipe
    line = refusal(settings(bccd_teacher, few_images, few_cache, augment={key: OTHER[key]}))
    first, *others = named(line)
    there, wanted = re.fullmatch(rf"recipe\.{key}: (.*) there, (.*) wanted", first).groups()  # type: ignore[union-attr]  # None fails the test, too
    assert (yaml.safe_load(there), yaml.safe_load(wanted)) == (recipe[key], OTHER[key])
    if recipe[key] is not None:
        assert f"or the same settings: {key}={there.strip(chr(34))}" in line
    if key == "fraction":  # it chooses the images
        assert others[0] == "12 usable images there, 6 now"
    else:
        assert others == []
    with pytest.raises(SettingError, match=rf"{key}={re.escape(repr(OTHER[key]))} \(the cache has .*cache-kd extract"):
        check_pixel_settings({key: OTHER[key]}, Recipe.from_settings(recipe), 64)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(
    ("changes", "says", "command"),
    [
        ({"imgsz": 96}, ["imgsz: 64 there, 96 wanted"], "--imgsz 64"),
        ({"seed": 9}, ["seed: 0 there, 9 wanted"], "--seed 0"),
        ({"precision": "fp16"}, ['precision: "fp32" there, "fp16" wanted'], "--precision fp32"),
        ({"store": ("logits",)}, ['codec.store: ["features", "logits"] there, ["logits"] wanted'], "--store features,"),
        ({"taps": ("C4",)}, ['codec.layers: [] there, ["C4"] wanted'], "--taps ''"),
        (
            {"fidelity": "small"},
            ["codec.features.step: 0.15 there, 0.3 wanted", 'codec.fidelity: "default" there, "small" wanted'],
            "--fidelity default",
        ),
        (
            {"seed": 9, "imgsz": 96, "augment": {"mosaic": 0.5}},
            ["imgsz: 64 there, 96 wanted", "recipe.mosaic: 1.0 there, 0.5 wanted", "seed: 0 there, 9 wanted"],
            "--imgsz 64 mosaic=1.0 --seed 0",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_change_of_a_setting_is_refused(
    few_images: Path, few_cache: Path, bccd_teacher: Path, changes: dict[str, Any], says: list[str], command: str
) -> None:
    line = refusal(settings(bccd_teacher, few_images, few_cache, **changes))
    assert named(line) == says
    assert f"; give another --cache, or the same settings: {command}" in line


@pytest.mark.usefixtures("loaded_once")
def test_a_preset_with_other_parameters_is_refused(
    few_images: Path, few_cache: Path, bccd_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(fidelity.fidelity("default"), features=PairFeatures(0.16))
    monkeypatch.setitem(fidelity.FIDELITIES, "default", other)
    line = refusal(settings(bccd_teacher, few_images, few_cache))
    assert named(line) == ["codec.features.step: 0.15 there, 0.16 wanted"]


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("package", PIXEL_PACKAGES)
def test_a_change_of_a_version_that_changes_pixels_is_refused(
    few_images: Path, few_cache: Path, bccd_teacher: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    now = versions.package_versions(PIXEL_PACKAGES)
    monkeypatch.setattr(identity, "package_versions", lambda packages: {**now, package: "99.1"})
    line = refusal(settings(bccd_teacher, few_images, few_cache))
    there = f'"{now[package]}"' if now[package] else "null"
    assert named(line) == [f'versions.{package}: {there} there, "99.1" wanted']
    assert line.endswith(f"pip install {package}=={now[package]}" if now[package] else "or the same settings")


def test_the_command_line_refuses_in_one_line(few_images: Path, few_cache: Path, bccd_teacher: Path) -> None:
    words = [
        "extract",
        "--teacher",
        bccd_teacher,
        "--data",
        few_images,
        "--cache",
        few_cache,
        "--imgsz",
        "64",
        "mosaic=0.5",
    ]
    done = CliRunner().invoke(main, [*map(str, words), "hsv_h=0.2", "--device", "cpu"])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert named(line) == ["recipe.hsv_h: 0.015 there, 0.2 wanted", "recipe.mosaic: 1.0 there, 0.5 wanted"]
    assert line.endswith("give another --cache, or the same settings: hsv_h=0.015 mosaic=1.0")


# -- what changes it: the teacher -------------------------------------------------------------------------------------


def first(model: nn.Module, kind: type[nn.Module] | str) -> Any:
    return next(
        m for m in model.modules() if (type(m).__name__ == kind if isinstance(kind, str) else isinstance(m, kind))
    )


TEACHERS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "weight": (lambda m: flip_bit(first(m, nn.Conv2d).weight), "teacher.weights"),
    "running mean": (lambda m: flip_bit(first(m, nn.BatchNorm2d).running_mean), "teacher.weights"),
    "head bias": (lambda m: flip_bit(m.model[-1].cv3[0][-1].bias), "teacher.weights"),
    "eps": (lambda m: setattr(first(m, nn.BatchNorm2d), "eps", 1e-5), "teacher.structure"),
    "activation": (lambda m: setattr(m.model[0], "act", nn.ReLU()), "teacher.structure"),
    "no residual": (lambda m: setattr(first(m, "Bottleneck"), "add", False), "teacher.structure"),
    "dilation": (lambda m: setattr(first(m, nn.Conv2d), "dilation", (2, 2)), "teacher.structure"),
    "upsampling": (lambda m: setattr(first(m, nn.Upsample), "mode", "bilinear"), "teacher.structure"),
    "joined otherwise": (lambda m: setattr(first(m, "Concat"), "f", [-1, 4]), "teacher.structure"),
    "names": (lambda m: setattr(m, "names", {0: "RBC", 1: "Platelets", 2: "WBC"}), "teacher.names"),
}


@pytest.mark.parametrize("change", TEACHERS)
def test_a_change_of_the_teacher_is_another_identity(
    bccd_checkpoint: Checkpoint, bccd_teacher: Path, tmp_path: Path, change: str
) -> None:
    apply, part = TEACHERS[change]
    path = saved_with(bccd_teacher, tmp_path / "other.pt", lambda stored: apply(stored["ema"] or stored["model"]))
    other = load_teacher(path)
    # Whole identities are not asked for: a model joined otherwise may not run.
    weights, structure = (
        getattr(other, name) != getattr(bccd_checkpoint, name) for name in ("weights_sha256", "structure_sha256")
    )
    names = other.model.names != bccd_checkpoint.model.names
    assert {"teacher.weights": weights, "teacher.structure": structure, "teacher.names": names} == {
        name: name == part for name in ("teacher.weights", "teacher.structure", "teacher.names")
    }


def test_other_strides_are_another_identity(bccd_checkpoint: Checkpoint) -> None:
    model = copy.deepcopy(bccd_checkpoint.model)
    model.model[-1].stride *= 2
    parts = [identity.teacher_identity(replace(bccd_checkpoint, model=each)) for each in (bccd_checkpoint.model, model)]
    assert [str(difference) for difference in differences(*parts)] == [
        "strides: [8, 16, 32] there, [16, 32, 64] wanted"
    ]


@pytest.mark.parametrize("change", ["weight", "running mean", "names", "eps"])
def test_another_teacher_is_refused_by_extract_and_verify(
    few_images: Path, few_cache: Path, bccd_teacher: Path, tmp_path: Path, change: str
) -> None:
    apply, part = TEACHERS[change]
    other = saved_with(bccd_teacher, tmp_path / "other.pt", lambda stored: apply(stored["ema"] or stored["model"]))
    line = refusal(settings(other, few_images, few_cache))
    (difference,) = named(line)
    assert re.fullmatch(rf"{part}: (\w{{12}}|\[.*\]) there, (\w{{12}}|\[.*\]) wanted", difference)
    assert line.endswith("or the same settings: its teacher (best.pt, not other.pt)")
    with pytest.raises(MismatchError, match=rf"other.pt is not the teacher of .* \({part}: .*--teacher best.pt"):
        verify(few_cache, teacher=other, say=print)


# -- what changes it: the data set ------------------------------------------------------------------------------------


def add_image(data: Path) -> None:
    shutil.copyfile(files(data, "images")[0], data.parent / "images" / "train" / "zzz.jpg")


def swap_both(data: Path) -> None:
    for kind in ("images", "labels"):
        swap(files(data, kind)[2], files(data, kind)[5])


DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte of an image": (
        lambda d: change_byte(files(d, "images")[4]),
        r"the image of item 4 \(\S+.jpg\) changed: content \w{12} there, \w{12} now",
    ),
    "byte of a label": (
        lambda d: files(d, "labels")[4].write_text(files(d, "labels")[4].read_text().replace("0.", "0.0", 1)),
        r"the label of item 4 \(\S+.jpg\) changed: content \w{12} there, \w{12} now",
    ),
    "label added to": (
        lambda d: files(d, "labels")[3].open("a").write("0 0.5 0.5 0.1 0.1\n"),
        r"the label of item 3 \(\S+.jpg\) changed: content \w{12} there, \w{12} now",
    ),
    "label emptied": (
        lambda d: files(d, "labels")[3].write_text(""),
        r"the label of item 3 \(\S+.jpg\) changed: content \w{12} there, \w{12} now",
    ),
    "label removed": (
        lambda d: files(d, "labels")[3].unlink(),
        r"the label of item 3 \(\S+.jpg\) changed: content \w{12} there, absent now",
    ),
    "labels swapped": (
        lambda d: swap(files(d, "labels")[1], files(d, "labels")[2]),
        r"the label of item 1 \(\S+.jpg\) changed: content .*; the label of item 2 \(\S+.jpg\) changed: content .*",
    ),
    "image removed": (
        lambda d: files(d, "images")[3].unlink(),
        r"12 usable images there, 11 now; image \S+.jpg \(item 3 there\) is gone",
    ),
    "image added": (add_image, r"12 usable images there, 13 now; image zzz.jpg \(item 12 now\) is new"),
    "renamed into another order": (
        lambda d: rename(d, 0, "zzz"),
        r"other order: item 0 was \S+.jpg, item 0 is \S+.jpg \(content \w{12} there, \w{12} now\); .*; and 6 more",
    ),
    "two swapped": (
        swap_both,
        r"other order: item 2 was .*; other order: item 5 was \S+.jpg, item 5 is \S+.jpg \(content .*\)",
    ),
}


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("change", DATA)
def test_a_change_of_the_data_set_is_refused(
    few_cache: Path, bccd_teacher: Path, own_data: Path, tmp_path: Path, change: str
) -> None:
    apply, says = DATA[change]
    apply(own_data)
    line = refusal(settings(bccd_teacher, own_data, few_cache))
    assert re.search(rf"is a cache of something else \({says}\); give another --cache, or the same settings: its", line)
    with pytest.raises(MismatchError, match=rf"{SEEN}{says}; restore it, or extract again: cache-kd extract"):
        train(TrainSettings("yolov8n.yaml", few_cache, own_data, settings={**FAST, "project": str(tmp_path / "runs")}))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(MismatchError, match=rf"{SEEN}{says}; restore it"):
        verify(few_cache, pixels=True, data=own_data, say=print)
