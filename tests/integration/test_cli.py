"""The command line and the Python interface say and return what they promise, and load nothing that is not needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import cache_kd
from cache_kd.cli import main
from cache_kd.errors import SettingError
from cache_kd.losses import LOSSES
from cache_kd.structures import View
from cache_kd.views.seeding import pixel_hash

HEAVY = ("torch", "ultralytics", "zarr", "numcodecs", "numpy", "cv2", "yaml")
SMALL = ["--imgsz", "64", "--batch", "4", "--views", "1", "--plain-views", "0", "--device", "cpu"]


def python(code: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def command(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m cache_kd` in a process of its own, as a user does."""
    line = [sys.executable, "-m", "cache_kd", *map(str, words)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)


HELP = f"""
import sys
from click.testing import CliRunner
from cache_kd.cli import main
for words in ([], *([name] for name in main.commands)):
    done = CliRunner().invoke(main, [*words, "--help"])
    assert done.exit_code == 0 and "Usage: " in done.output, words
    assert not words or "cache-kd " + words[0] in done.output, f"no example in the help of {{words}}"
print(sorted(set({HEAVY!r}) & set(sys.modules)), sorted(main.commands))
"""


def test_help_of_every_command_has_an_example_and_loads_nothing_heavy(tmp_path: Path) -> None:
    done = python(HELP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[] {sorted(main.commands)}"
    assert {"extract", "train", "inspect", "verify", "losses", "demo"} <= set(main.commands)


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    done = python(f"import sys, cache_kd; print(sorted(set({HEAVY!r}) & set(sys.modules)))", cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert command("--version", cwd=tmp_path).stdout == f"cache-kd, version {cache_kd.__version__}\n"


def only_document(done: subprocess.CompletedProcess[str]) -> Any:
    """Return the JSON document that stdout consists of, in one line."""
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_extract_prints_one_json_document(test_data: Path, few_images: Path, tmp_path: Path) -> None:
    teacher = test_data / "weights" / "yolov8s-bccd.pt"
    words = ["extract", "--teacher", teacher, "--data", few_images, *SMALL, "--cache", "cache", "--json"]
    facts = only_document(command(*words, cwd=tmp_path))
    cache = cache_kd.open_cache(tmp_path / "cache")
    assert facts["cache"] == "cache"
    assert facts["digest"] == cache.manifest.digest
    assert facts["views"] == ["mixed-0000"]
    assert (facts["images"], facts["items_extracted"], facts["bytes"]) == (12, 12, cache.num_bytes)
    again = only_document(command(*words, cwd=tmp_path))
    assert (again["items_extracted"], again["digest"]) == (0, facts["digest"])


def test_inspect_prints_one_json_document(few_cache: Path, tmp_path: Path) -> None:
    facts = only_document(command("inspect", few_cache, "--json", cwd=tmp_path))
    cache = cache_kd.open_cache(few_cache)
    assert facts["digest"] == cache.manifest.digest
    assert facts["views"] == ["mixed-0000", "mixed-0001", "plain-0000"]
    assert (facts["images"], facts["imgsz"], facts["bytes"]) == (12, 64, cache.num_bytes)
    assert sum(facts["bytes_by_column"].values()) == facts["bytes"]
    assert facts["head"]["names"] == ["RBC", "WBC", "Platelets"]


def test_verify_prints_one_json_document_and_its_exit_code_says_the_rest(
    few_cache: Path, test_data: Path, tmp_path: Path
) -> None:
    teacher = test_data / "weights" / "yolov8s-bccd.pt"
    words = ["verify", few_cache, "--pixels", "--teacher", teacher, "--sample", "6", "--json"]
    facts = only_document(command(*words, cwd=tmp_path))
    assert facts["ok"] is True
    assert (facts["pixels_checked"], facts["targets_checked"]) == (36, 6)
    damaged = Path(shutil.copytree(few_cache, tmp_path / "damaged"))
    shard = next(path for path in sorted(damaged.rglob("*")) if path.parent.name == "c" or path.name == "0")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    done = command("verify", damaged, "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False


def test_losses_prints_one_json_document(tmp_path: Path) -> None:
    facts = only_document(command("losses", "--json", cwd=tmp_path))
    rows = facts if isinstance(facts, list) else facts["losses"]
    assert [row["name"] for row in rows] == list(LOSSES)


@pytest.mark.parametrize(
    ("name", "says"),
    [("inspect", "views     2 mixed, 1 plain, of 12 images at 64 px"), ("verify", "everything is whole")],
)
def test_commands_say_their_result_in_words(few_cache: Path, name: str, says: str) -> None:
    assert says in CliRunner().invoke(main, [name, str(few_cache)]).stdout


def test_verify_counts_what_it_reads_in_megabytes_and_views_one_by_one(few_cache: Path) -> None:
    lines = CliRunner().invoke(main, ["verify", str(few_cache), "--pixels"]).stdout.splitlines()
    assert [line.partition(",")[0] for line in lines if "/s, 0 s left" in line] == ["1/1 MB", "36/36 views"]


def test_losses_prints_a_table() -> None:
    text = CliRunner().invoke(main, ["losses"]).stdout
    assert all(name in text for name in LOSSES)


# -- the Python interface ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(few_cache: Path) -> cache_kd.Cache:
    return cache_kd.open_cache(few_cache)


def test_a_cache_says_what_it_holds(cache: cache_kd.Cache, few_cache: Path, few_images: Path) -> None:
    assert cache.views == (View("mixed", 0), View("mixed", 1), View("plain", 0))
    images = sorted(path.name for path in (few_images.parent / "images" / "train").iterdir())
    assert [image.path for image in cache.images] == images
    stored = (path for path in (few_cache / "views").rglob("*") if path.is_file() and path.suffix != ".json")
    assert cache.num_bytes == sum(path.stat().st_size for path in stored)
    assert cache.manifest.imgsz == 64


def test_targets_have_the_promised_shapes_and_types(cache: cache_kd.Cache) -> None:
    targets = cache.read(view=1, index=5)
    assert targets.features is not None and targets.scores is not None and targets.boxes is not None
    assert [level.shape for level in targets.features] == [(128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert (targets.scores.shape, targets.boxes.shape) == ((84, 3), (84, 64))
    assert {array.dtype for array in (*targets.features, targets.scores, targets.boxes)} == {np.dtype("float32")}
    assert targets.sent is not None and (targets.sent.shape, targets.sent.dtype) == ((84,), np.dtype(bool))
    assert 0 < targets.sent.sum() < 84


def test_pixels_are_those_that_the_teacher_saw(cache: cache_kd.Cache) -> None:
    hashes = set()
    for view, plain in ((0, False), (1, False), (0, True)):
        pixels = cache.pixels(view=view, index=5, plain=plain)
        assert (pixels.shape, pixels.dtype) == ((3, 64, 64), np.dtype("uint8"))
        stored = cache.read(view=view, index=5, plain=plain).pixel_hash
        assert pixel_hash(pixels) == stored
        hashes.add(stored)
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("view", "index", "plain", "says"),
    [
        (2, 0, False, "mixed-0002"),
        (1, 0, True, "plain-0001"),
        (0, 12, False, r"no sample 12; allowed: 0 to 11"),
        (0, -1, False, r"no sample -1; allowed: 0 to 11"),
        (-1, 0, False, r"no such view: mixed:-1"),
    ],
)
def test_a_view_or_index_that_is_not_there_is_refused(
    cache: cache_kd.Cache, view: int, index: int, plain: bool, says: str
) -> None:
    for ask in (cache.read, cache.pixels):
        with pytest.raises(SettingError, match=says):
            ask(view=view, index=index, plain=plain)


def test_extract_and_train_are_functions(test_data: Path, few_images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    cache = cache_kd.extract(
        teacher=test_data / "weights" / "yolov8s-bccd.pt",
        data=few_images,
        views=1,
        plain_views=0,
        imgsz=64,
        batch=4,
        device="cpu",
        fidelity="small",
        mosaic=0.0,
    )
    assert cache.path.parent.name == "kd_cache"
    assert cache.path.resolve() == cache_kd.open_cache().path.resolve()
    assert cache.manifest.codec["fidelity"] == "small"
    assert cache.manifest.recipe["mosaic"] == 0.0
    done = cache_kd.train(
        student="yolov8n.yaml",
        cache=cache,
        losses=["cwd", "ld:weight=0.5"],
        name="mine",
        epochs=1,
        batch=4,
        plots=False,
        device="cpu",
    )
    assert done.folder == tmp_path / "runs" / "detect" / "mine"
    assert [str(spec) for spec in done.losses] == [f"cwd:weight={LOSSES['cwd'].default_weight}", "ld:weight=0.5"]
    assert (done.folder / "weights" / "best.pt").is_file()
    assert "metrics/mAP50-95(B)" in done.metrics


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'cache_kd' has no attribute 'distil'"):
        cache_kd.distil  # noqa: B018


def test_a_wrong_teacher_is_one_line_of_a_real_process(tmp_path: Path, few_images: Path) -> None:
    (tmp_path / "best.pt").write_text("not a checkpoint")
    done = command("extract", "--teacher", "best.pt", "--data", few_images, *SMALL, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("cache-kd: teacher best.pt is not a usable Ultralytics checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_student_that_does_not_fit_is_one_line_of_a_real_process(tmp_path: Path, few_cache: Path) -> None:
    settings = ["epochs=1", "batch=4", "val=False", "plots=False", "device=cpu"]
    done = command("train", "--student", "yolov8n-p2.yaml", "--cache", few_cache, *settings, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the student's head has strides [4, 8, 16, 32]" in line
    assert list(tmp_path.iterdir()) == []
