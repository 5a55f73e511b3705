"""A cache whose author made all its checksums agree, and that is not what an extraction writes, is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cache_kd.cache.files import open_seal, seal, sha256
from cache_kd.cache.manifest import columns_from_json, root_attributes
from cache_kd.cli import main
from cache_kd.fingerprint import canonical_json, digest_json
from cache_kd.pipeline.opened import Cache, extract_command

TRAIN = ["train", "--student", "yolov8n.yaml", "epochs=1", "batch=4", "val=False", "plots=False", "device=cpu"]


@pytest.fixture
def foreign(few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a sound cache."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(few_cache, tmp_path / "cache"))


def forge(cache: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make everything that vouches for it agree."""
    content = open_seal(json.loads((cache / "manifest.json").read_bytes()))
    change(content)
    content["identity_digest"] = digest_json(content["identity"])
    (cache / "manifest.json").write_bytes(seal(content))
    group = json.loads((cache / "zarr.json").read_bytes())
    columns = columns_from_json(content["columns"])
    group["attributes"]["cache_kd"] = root_attributes(content["identity"], columns, content["num_images"])
    (cache / "zarr.json").write_bytes(canonical_json(group))


def line_of(*words: str | Path) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    (line,) = done.stderr.splitlines()
    assert line.startswith("cache-kd: ") and "Traceback" not in done.output
    return line


@pytest.mark.parametrize("command", ["inspect", "train"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(teacher={}, environment={}), "teacher.file is missing; teacher.file_sha256 is"),
        (lambda m: m["environment"].update(batch="many"), "environment.batch is 'many'; allowed: a number from 1"),
        (lambda m: m["codec"].update(store=["pickle"]), "codec.store is ['pickle']; allowed: stores"),
        (lambda m: m["teacher"]["head"].update(activation=["x"]), "teacher.head.activation is ['x']; allowed: a text"),
        (lambda m: m["teacher"].update(data=["x"] * 1000), "teacher.data is ['x', 'x'"),
    ],
    ids=["empty", "batch", "store", "activation", "long"],
)
def test_a_manifest_of_something_else_is_one_line(foreign: Path, command: str, change: Any, says: str) -> None:
    forge(foreign, change)
    line = line_of("inspect", foreign) if command == "inspect" else line_of(*TRAIN, "--cache", foreign)
    assert f"{foreign / 'manifest.json'}: " in line and says in line
    assert len(line) < 3000


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(imgsz=96),
        lambda m: m["columns"][0].update(shape=[8]),
        lambda m: m["columns"].pop(),
        lambda m: m["codec"].update(features={}),
        lambda m: m["codec"].update(logits="x"),
    ],
    ids=["imgsz", "shape", "column", "features", "logits"],
)
def test_a_codec_that_does_not_fit_is_one_line(foreign: Path, change: Any) -> None:
    forge(foreign, change)
    line = line_of(*TRAIN, "--cache", foreign)
    assert f"{foreign / 'manifest.json'}: " in line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(images=d["images"][:3]), "3 images are listed, the manifest says 12"),
        (lambda d: d["images"].__setitem__(4, ["a.jpg"]), "image 4 is ['a.jpg'], no row of ours"),
        (lambda d: d.update(images="many"), "no images are listed"),
    ],
    ids=["fewer", "short row", "text"],
)
def test_a_list_of_images_of_something_else_is_one_line(foreign: Path, change: Any, says: str) -> None:
    content = json.loads((foreign / "data.json").read_bytes())
    change(content)
    (foreign / "data.json").write_bytes(canonical_json(content))
    forge(foreign, lambda m: m.update(data_sha256=sha256((foreign / "data.json").read_bytes())))
    line = line_of(*TRAIN, "--cache", foreign)
    assert f"{foreign / 'data.json'}: {says}" in line


def test_a_head_names_no_other_code(foreign: Path) -> None:
    forge(foreign, lambda m: m["teacher"]["head"].update(activation="DataParallel"))
    line = line_of(*TRAIN, "--cache", foreign, "--loss", "crosskd")
    assert "the stored head is not a stock Detect head: activation 'DataParallel'" in line


def test_a_command_to_copy_is_quoted(foreign: Path) -> None:
    forge(foreign, lambda m: m["teacher"].update(file="a; touch b", augment={"x": "1; touch c"}))
    command = extract_command(Cache(foreign).manifest)
    assert "'a; touch b'" in command and "'x=1; touch c'" in command
