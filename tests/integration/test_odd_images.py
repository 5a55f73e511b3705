"""Odd images, labels, names and data files work from extraction to training, and nothing is written beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_bad_input
import yaml
from PIL import Image
from refusals import everything_below, run
from small_inputs import build_model, save_model, small_data

work = test_bad_input.work
SMALL = ["--imgsz", "64", "--batch", "64", "--device", "cpu", "--cache", "cache"]
BASE = {"train": "images/train", "val": "images/val", "names": ["RBC", "WBC", "Platelets"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that loads quickly."""
    return save_model(build_model("yolov8n.yaml"), tmp_path_factory.mktemp("teacher") / "best.pt", imgsz=64)


@pytest.fixture
def data(test_data: Path, tmp_path: Path) -> Path:
    """The data file of five images that a test may change."""
    return small_data(test_data / "data" / "bccd", tmp_path / "data", train=5, val=1)


def works(data: Path, teacher: Path, *options: str, epochs: int = 1, views: int = 2) -> dict[str, Any]:
    """Extract, verify and train with every pixel compared; return the cache's `data.json` and what was said."""
    before = everything_below(data.parent)
    extracted = run("extract", "--teacher", teacher, "--data", data, *SMALL, "--views", str(views), *options)
    assert extracted.exit_code == 0, (extracted.stderr, extracted.exception)
    verified = run("verify", "cache", "--pixels")
    assert verified.exit_code == 0 and " 0 differ" in verified.stdout, verified.output
    settings = [f"epochs={epochs}", "close_mosaic=1", "batch=64", "plots=False", "device=cpu"]
    words = ["train", "--student", "yolov8n.yaml", "--cache", "cache", "--loss", "cwd", "--verify-pixels", "all"]
    trained = run(*words, *settings)
    assert trained.exit_code == 0, (trained.stderr, trained.exception)
    assert everything_below(data.parent) == before
    return {**json.loads(Path("cache/data.json").read_text()), "said": extracted.stdout}


def add(data: Path, name: str, image: Image.Image, **options: Any) -> Path:
    """Write an image with a label of one box; return its file."""
    file = data.parent / "images" / "train" / name
    image.save(file, **options)
    label = data.parent / "labels" / "train" / f"{Path(name).stem}.txt"
    label.write_text("0 0.5 0.5 0.4 0.4\n")
    return file


def test_odd_images_and_labels(data: Path, teacher: Path) -> None:
    images = sorted((data.parent / "images" / "train").iterdir())
    labels = [data.parent / "labels" / "train" / f"{image.stem}.txt" for image in images]
    labels[0].unlink()
    labels[1].write_text("")
    labels[2].write_text("0 1.5 0.5 0.2 0.2\n")
    labels[3].write_text("0 0.5 0.5 0.2 0.2\n" * 3)
    shutil.copyfile(images[4], images[4].with_name("twin.jpg"))
    shutil.copyfile(labels[4], labels[4].with_name("twin.txt"))
    colour = Image.open(images[4]).convert("RGB")
    turned = Image.Exif()
    turned[274] = 6
    add(data, "rotated.jpg", colour.resize((200, 90)), exif=turned)
    add(data, "grey.png", colour.convert("L"))
    add(data, "deep.png", Image.fromarray(np.arange(200 * 300, dtype=np.uint16).reshape(200, 300)))
    add(data, "cmyk.jpg", colour.convert("CMYK"))
    add(data, "alpha.png", colour.convert("RGBA"))
    add(data, "wide.png", colour.resize((4000, 10)))
    add(data, "dot.png", colour.resize((1, 1)))
    cut, tail = add(data, "cut.jpg", colour), add(data, "tail.jpg", colour)
    cut.write_bytes(cut.read_bytes()[:3000])
    tail.write_bytes(tail.read_bytes() + b"more")
    found = works(data, teacher)
    assert found["skipped"] == [f"{name}: ignored as corrupt" for name in (images[2].name, "cut.jpg", "dot.png")]
    assert len(found["images"]) == 12
    assert "out of bounds coordinates" in found["said"] and "2 duplicate labels removed" in found["said"]
    assert "tail.jpg: JPEG without its end marker, read as it is" in found["said"]


def test_odd_names(data: Path, teacher: Path) -> None:
    colour = Image.open(next((data.parent / "images" / "train").iterdir())).convert("RGB")
    names = ["a  'b' \"c\".png", "new\nline.png", "名前-имя-ß.png", f"{'x' * 240}.png", "100%s {0} $HOME.png"]
    for name in names:
        add(data, name, colour.resize((40, 30)))
    bad = add(data, "latin.png", colour.resize((40, 30)))
    os.rename(bad, os.fsencode(bad.parent) + b"/lat\xef\x6e.png")
    add(data, "a: ignoring.png", colour.resize((3, 3)))
    add(data, "b\nline.png", colour.resize((3, 3)))
    found = works(data, teacher)
    assert {*names, "lat\\udcefn.png"} <= {row[0] for row in found["images"]}
    assert found["skipped"] == ["a: ignoring.png: ignored as corrupt", "b\\nline.png: ignored as corrupt"]
    assert all(line for line in found["said"].splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "views"), [(4, 1), (2, 5)], ids=["more epochs", "more views"])
def test_one_image_is_a_data_set(data: Path, teacher: Path, epochs: int, views: int) -> None:
    for image in sorted((data.parent / "images" / "train").iterdir())[1:]:
        image.unlink()
    assert len(works(data, teacher, epochs=epochs, views=views)["images"]) == 1


def as_text(data: Path) -> dict[str, Any]:
    """List the images by `./` and by absolute paths, and one that is not there."""
    first, *others = sorted((data.parent / "images" / "train").iterdir())
    lines = [str(first), *(f"./images/train/{image.name}" for image in others), "./images/train/gone.jpg"]
    (data.parent / "train.txt").write_text("\n".join(lines))
    return {**BASE, "train": "train.txt"}


def from_here(data: Path) -> dict[str, Any]:
    """List one image by a path from the working directory and one by an absolute path."""
    first, second, *_ = sorted((data.parent / "images" / "train").iterdir())
    (data.parent / "train.txt").write_text(f"{os.path.relpath(first)}\n{second}\n")
    return {**BASE, "train": "train.txt"}


def as_folders(data: Path) -> dict[str, Any]:
    """Spread the images over two folders."""
    for part in ("images", "labels"):
        (data.parent / part / "more").mkdir()
        for file in sorted((data.parent / part / "train").iterdir())[:2]:
            file.rename(data.parent / part / "more" / file.name)
    return {**BASE, "train": ["images/train", "images/more"]}


FORMS: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "text": (as_text, []),
    "text from here": (from_here, []),
    "folders": (as_folders, []),
    "absolute path, names by number": (
        lambda data: {**BASE, "path": str(data.parent), "names": {0: "RBC", 1: "WBC", 2: "Platelets"}, "nc": 3},
        [],
    ),
    "relative path": (lambda data: {**BASE, "path": os.path.relpath(data.parent)}, []),
    "one class": (lambda data: BASE, ["single_cls=True"]),
    "some classes": (lambda data: BASE, ["classes=[0,2]"]),
    "a fraction": (lambda data: BASE, ["fraction=0.5"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_data_file(data: Path, teacher: Path, form: str) -> None:
    content, options = FORMS[form]
    data.write_text(yaml.safe_dump(content(data)))
    works(data, teacher, *options, views=1)


@pytest.mark.slow
def test_long_paths_and_folders_that_may_not_be_written(data: Path, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120) / ("e" * 100)
    shutil.copytree(data.parent, folder)
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        works(folder / data.name, teacher, views=1)
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
