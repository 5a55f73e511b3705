"""`inspect --out` draws what it promises from a real cache, and says in one line what it cannot draw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import refusals
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from refusals import Refused, run

from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import extract
from cache_kd.pipeline.opened import Cache
from cache_kd.report.canvas import INKS

work, refused = refusals.work, refusals.refused


def ink(path: Path, source: str) -> int:
    """Return how many pixels of a picture have the colour of a source's boxes."""
    return int((np.abs(imread(path)[..., :3] - to_rgb(INKS[source].colour)) < 0.03).all(axis=2).sum())


def test_one_view_is_drawn_with_teacher_and_student(
    few_cache: Path, few_images: Path, bccd_teacher: Path, work: Path
) -> None:
    name = Path(Cache(few_cache).images[5].path).name
    words = ("inspect", few_cache, "--image", name, "--view", "1", "--out", "drawn", "--data", few_images)
    done = run(*words, "--student", bccd_teacher, "--teacher", bccd_teacher, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    files = [Path(file) for file in facts["pictures"]]
    stem = "image-0005-mixed-0001"
    assert [file.name for file in files] == [f"{stem}-boxes.png", f"{stem}-features.png", f"{stem}-codec.png"]
    assert facts["notes"] == [] and facts["images"] == 12
    assert sorted(files) == sorted(Path("drawn").iterdir())
    boxes = imread(files[0])
    assert boxes.shape[1] > 2.5 * boxes.shape[0]  # three panels
    assert all(ink(files[0], source) > 200 for source in INKS)
    for file in files:
        picture = imread(file)
        assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.1
    # without the teacher: fewer panels, and the same views give the same bytes
    again = run(*words[:-4], "--out", "again", "--data", few_images)
    assert again.exit_code == 0 and again.stdout.splitlines()[-3:] == [f"again/{file.name}" for file in files]
    assert (work / "again" / files[1].name).read_bytes() == files[1].read_bytes()
    assert (work / "again" / files[2].name).read_bytes() != files[2].read_bytes()
    assert ink(work / "again" / files[0].name, "student") == 0


def test_sheets_of_views(few_cache: Path, few_images: Path, work: Path) -> None:
    for words, name in (
        ((), "views.png"),
        (("--image", "3"), "image-0003-views.png"),
        (("--view", "plain:0"), "plain-0000.png"),
    ):
        done = run("inspect", few_cache, *words, "--out", "drawn", "--data", few_images)
        assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, f"drawn/{name}"), done.output
        assert ink(work / "drawn" / name, "labels") > 200 and ink(work / "drawn" / name, "teacher") > 200


@pytest.mark.parametrize(("store", "missing"), [("features", "logits"), ("logits", "features")])
def test_what_a_cache_does_not_keep_is_a_note(
    store: str, missing: str, few_images: Path, bccd_teacher: Path, loaded_once: None, work: Path
) -> None:
    made = extract(
        ExtractSettings(
            bccd_teacher, few_images, work / "c", store=(store,), views=1, plain_views=0, imgsz=64, batch=4, pack="png"
        )
    ).path
    done = run("inspect", made, "--image", "0", "--view", "0", "--out", "drawn")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith(f"the cache keeps no {missing}: the teacher's ")
    assert len(list(Path("drawn").iterdir())) == 3
    assert (ink(Path("drawn/image-0000-mixed-0000-boxes.png"), "teacher") == 0) is (missing == "logits")


def test_other_pixels_are_a_note(few_cache: Path, own_data: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache_kd.pipeline.pictures.pixel_hash", lambda pixels: b"12345678")
    done = run("inspect", few_cache, "--image", "0", "--view", "0", "--out", "drawn", "--data", own_data)
    assert done.exit_code == 0, done.output
    assert "view mixed-0000 of image 0 has other pixels than the teacher saw; check all: " in done.stdout


def test_refusals(few_cache: Path, few_images: Path, bccd_teacher: Path, test_data: Path, refused: Refused) -> None:
    out = ("--out", "drawn", "--data", few_images)
    inspect = ("inspect", few_cache)
    assert "--image is about pictures; say where to draw them: --out pictures." in refused(
        *inspect, "--image", "0", code=2
    )
    assert "--import is about pictures" in refused(*inspect, "--import", "a.py", code=2)
    assert "no view mixed-0009; known: mixed-0000, mixed-0001, plain-0000" in refused(*inspect, *out, "--view", "9")
    assert "no such view: 'x'; allowed: 3 (mixed) or plain:0" in refused(*inspect, *out, "--view", "x")
    assert "--image 12: no such image; allowed: 0 to 11" in refused(*inspect, *out, "--image", "12")
    assert "--teacher shows what the codec changed in one view; name it" in refused(
        *inspect, *out, "--teacher", bccd_teacher
    )
    line = refused(*inspect, *out, "--student", "gone.pt")
    assert "student gone.pt: no such file; name an existing checkpoint: --student best.pt" in line
    other = test_data / "weights" / "yolov8n-int8deq.pt"
    assert "is not the teacher of" in refused(*inspect, *out, "--image", "0", "--view", "0", "--teacher", other)
    assert "lies in the cache; give a folder outside it" in refused(*inspect, "--out", few_cache / "drawn")


def test_a_damaged_cache_draws_nothing(own_cache: Path, few_images: Path, work: Path) -> None:
    shutil.rmtree(own_cache / "views" / "mixed-0000")
    done = run("inspect", own_cache, "--image", "0", "--view", "0", "--out", "drawn", "--data", few_images)
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
