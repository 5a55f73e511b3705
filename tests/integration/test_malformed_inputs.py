"""Every malformed input of every command ends alike: one line, exit code 1 (usage: 2), no traceback, nothing left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import refusals
import torch
import yaml
from refusals import QUICK, SMALL, Refused
from small_inputs import build_model, save_model, small_data

from cache_kd.cache.manifest import NAME as MANIFEST
from cache_kd.cache.manifest import ROOT

work, refused = refusals.work, refusals.refused
BASE = {"train": "images/train", "val": "images/val", "names": ["RBC", "WBC", "Platelets"]}
PROMISED = 60


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that loads quickly."""
    return save_model(build_model("yolov8n.yaml"), tmp_path_factory.mktemp("teacher") / "best.pt", imgsz=64)


@pytest.fixture
def one_image(test_data: Path, tmp_path: Path) -> Path:
    """The data file of a single image that a test may change."""
    return small_data(test_data / "data" / "bccd", tmp_path / "one", train=1, val=1)


# -- teachers ---------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    save_model(build_model("yolov8n.yaml"), path)
    path.write_bytes(path.read_bytes()[:-5000])


def weights_only(path: Path) -> None:
    torch.save(build_model("yolov8n.yaml").state_dict(), path)


def fused(path: Path) -> None:
    save_model(build_model("yolov8n.yaml").eval().fuse(verbose=False), path)


def one_weight(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        model = build_model("yolov8n.yaml")
        model.model[22].cv3[0][2].bias.data[1] = value
        save_model(model, path)

    return write


TEACHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, "is not a usable Ultralytics checkpoint"),
    "state dict": (weights_only, "is not a usable Ultralytics checkpoint"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "is not a usable Ultralytics checkpoint"),
    "list": (lambda path: torch.save([1, 2], path), "is not a usable Ultralytics checkpoint"),
    "no model": (lambda path: torch.save({"model": None, "ema": None}, path), "is not a usable Ultralytics checkpoint"),
    "text as model": (lambda path: torch.save({"model": "yolov8n"}, path), "is not a usable Ultralytics checkpoint"),
    "fused": (fused, "is fused"),
    "folder": (lambda path: path.mkdir(), "no such file"),
    "nan weight": (one_weight(float("nan")), "1 of 3 values of model.22.cv3.0.2.bias are not finite"),
    "infinite weight": (one_weight(float("inf")), "1 of 3 values of model.22.cv3.0.2.bias are not finite"),
}


@pytest.mark.parametrize("fault", TEACHERS)
def test_a_malformed_teacher(refused: Refused, few_images: Path, tmp_path: Path, fault: str) -> None:
    write, says = TEACHERS[fault]
    write(tmp_path / "best.pt")
    line = refused("extract", "--teacher", tmp_path / "best.pt", "--data", few_images, *SMALL)
    assert f"teacher {tmp_path / 'best.pt'}" in line and says in line


# -- data files and labels --------------------------------------------------------------------------------------------

DATA_FILES: dict[str, tuple[bytes | Mapping[str, Any], str]] = {
    "empty": (b"", "must hold `key: value` lines"),
    "tabs": (b"train:\timages/train\n\tval: images/val\n", "is not a YAML file"),
    "bytes": (bytes(range(128, 256)), "is not a YAML file"),
    "text": (b"images/train", "it holds a str"),
    "nc and names differ": ({**BASE, "nc": 5}, "'names' length 3 and 'nc: 5' must match"),
    "nc is a word": ({"train": "images/train", "val": "images/val", "nc": "three"}, "must be an integer"),
    "nc is negative": ({"train": "images/train", "val": "images/val", "nc": -1}, "nc"),
    "names is a number": ({**BASE, "names": 3}, "names"),
    "names are empty": ({**BASE, "names": []}, "names"),
    "names have a gap": ({**BASE, "names": {0: "a", 2: "b"}}, "class"),
    "names are lists": ({**BASE, "names": [["a"], ["b"]]}, "names"),
    "train is a number": ({**BASE, "train": 3}, "train"),
    "train is a table": ({**BASE, "train": {"a": 1}}, "train"),
    "train lists a number": ({**BASE, "train": [1]}, "train"),
    "train is empty": ({**BASE, "train": ""}, "no `train:` entry"),
    "val is a number": ({**BASE, "val": 3}, "val"),
    "val is missing": ({**BASE, "val": "images/nowhere"}, "images/nowhere"),
    "path is missing": ({**BASE, "path": "nowhere"}, "nowhere"),
    "path is a number": ({**BASE, "path": 3}, "path"),
    "one channel": ({**BASE, "channels": 1}, "channels: 1 is not supported"),
    "channels is a word": ({**BASE, "channels": "three"}, "channels"),
    "train is an empty list": ({**BASE, "train": "nothing.txt"}, "nothing.txt"),
    "object": (b"!!python/object/apply:os.system ['touch canary']\n", "is not a YAML file"),
}


@pytest.mark.parametrize("fault", DATA_FILES)
def test_a_malformed_data_file(refused: Refused, teacher: Path, one_image: Path, fault: str) -> None:
    content, says = DATA_FILES[fault]
    one_image.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(dict(content)).encode())
    (one_image.parent / "nothing.txt").write_text("\n")
    line = refused("extract", "--teacher", teacher, "--data", one_image, *SMALL)
    assert says in line and one_image.parent.name in line


def test_a_folder_is_no_data_file(refused: Refused, teacher: Path, one_image: Path) -> None:
    assert "no such file" in refused("extract", "--teacher", teacher, "--data", one_image.parent, *SMALL)


LABELS = {
    "four columns": b"0 0.5 0.5 0.2\n",
    "six columns": b"0 0.5 0.5 0.2 0.2 0.9\n",
    "ragged": b"0 0.5 0.5 0.2 0.2\n0 0.5\n",
    "text": b"cell 0.5 0.5 0.2 0.2\n",
    "class beyond": b"3 0.5 0.5 0.2 0.2\n",
    "negative class": b"-1 0.5 0.5 0.2 0.2\n",
    "half a class": b"0.5 0.5 0.5 0.2 0.2\n",
    "negative": b"0 -0.5 0.5 0.2 0.2\n",
    "nan": b"0 nan 0.5 0.2 0.2\n",
    "infinite": b"0 inf 0.5 0.2 0.2\n",
    "huge": b"0 1e300 0.5 0.2 0.2\n",
    "pixels": b"0 320 240 50 50\n",
    "bytes": bytes(range(128, 256)),
    "comma": b"0,0.5,0.5,0.2,0.2\n",
}


@pytest.mark.parametrize("fault", LABELS)
def test_a_malformed_label_is_ultralytics_corrupt_label(
    refused: Refused, teacher: Path, one_image: Path, fault: str
) -> None:
    (label,) = (one_image.parent / "labels" / "train").iterdir()
    label.write_bytes(LABELS[fault])
    line = refused("extract", "--teacher", teacher, "--data", one_image, *SMALL)
    assert "ignoring corrupt image/label" in line and f"{label.stem}.jpg" in line


# -- options ----------------------------------------------------------------------------------------------------------

EXTRACT = [
    *[f"--{option} {value}" for option in ("views", "plain-views", "batch", "workers") for value in ("-1", "10**12")],
    *[f"--imgsz {value}" for value in ("-32", "33", "3200000")],
    *[f"--seed {value}" for value in ("10**30", "-10**30")],
    *[f"--fidelity {value}" for value in ("0", "EXACT", "''")],
    *[f"--precision {value}" for value in ("fp8", "''")],
    *[f"--store {value}" for value in ("features,features", "everything", ",")],
    *[f"--taps {value}" for value in ("C9", "999", "-1", "6,6", "6.cv9", "nan")],
    *[f"--device {value}" for value in ("cpu:9:9", "-1")],
    *[f"{key}=nan" for key in ("mosaic", "degrees", "hsv_h", "scale", "fraction")],
    *[f"{key}=inf" for key in ("mixup", "translate", "fliplr")],
    *[f"{key}=many" for key in ("mosaic", "shear", "fraction", "classes", "copy_paste_mode")],
    *["fraction=0", "fraction=-1", "fraction=[0.5,nan]", "classes=[99]", "classes=[-1]", "classes=[[0]]", "classes=[]"],
    *[
        "mosaic=-0.1",
        "degrees=[1]",
        "translate=2",
        "perspective=1e9",
        "imgsz=64",
        "=1",
        "mosaic==1",
        "single_cls=maybe",
    ],
]


def split(words: str) -> list[str]:
    """Return the words of a case; `''` is an empty word and `10**12` the number."""
    return [str(eval(word)) if "**" in word else word.replace("''", "") for word in words.split(" ")]


@pytest.mark.slow
@pytest.mark.parametrize("words", EXTRACT)
def test_a_malformed_option_of_extract(refused: Refused, teacher: Path, few_images: Path, words: str) -> None:
    line = refused("extract", "--teacher", teacher, "--data", few_images, *SMALL, *split(words))
    option, _, value = words.partition(" ")
    assert option.partition("=")[0].removeprefix("--") in line or (value and value in line)


TRAIN = [
    *[f"--balance {value}" for value in ("nan", "inf", "-0.1", "1")],
    *[f"--verify-pixels {value}" for value in ("ALL", "1")],
    *[f"epochs={value}" for value in ("0", "-1", "nan", "1.5", "many")],
    *[f"batch={value}" for value in ("0", "-4", "nan", "1.5", "many", "[4]")],
    *[f"lr0={value}" for value in ("nan", "inf", "-1", "fast")],
    *[f"{key}=-1" for key in ("workers", "patience", "close_mosaic", "nbs", "warmup_epochs", "weight_decay", "seed")],
    *[f"{key}=nan" for key in ("momentum", "box", "warmup_epochs", "time", "patience", "workers")],
    *[
        "optimizer=Nonsense",
        "time=-1",
        "resume=True",
        "cache=tape",
        "freeze=-1",
        "freeze=[a]",
        "momentum=2",
        "amp=perhaps",
    ],
    *["model=x", "data=x", "task=segment", "mode=val", "pretrained=gone.pt", "cfg=gone.yaml", "cls_pw=nan"],
]


@pytest.mark.slow
@pytest.mark.parametrize("words", TRAIN)
def test_a_malformed_option_of_train(refused: Refused, few_cache: Path, words: str) -> None:
    quick = [word for word in QUICK if word.partition("=")[0] != words.partition("=")[0]]
    line = refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--loss", "cwd", *quick, *split(words))
    assert words.partition(" ")[0].partition("=")[0].removeprefix("--") in line


USAGE = [
    *[f"extract --teacher t.pt --{o} {value}" for o in ("views", "imgsz", "seed") for value in ("nan", "1.5", "1e3")],
    *[f"train --student s.yaml --threads {value}" for value in ("0", "-1", "nan", "10**12")],
    *["train --student s.yaml --balance half", "verify c --sample some", "inspect a b", "losses cwd", "verify"],
    *["extract --teacher", "demo --seed x"],
]


@pytest.mark.parametrize("words", USAGE)
def test_malformed_usage(refused: Refused, words: str) -> None:
    assert "--help" in refused(*split(words), code=2)


LOSSES = ["", ":", "cwd:", "cwd:weight=inf", "cwd:weight=1e400", "cwd:warmup=-1", "cwd:until=1.5", "cwd:balance=1"]
LOSSES += ["cwd:cosine=2", "cwd:layers=P9", "ld:temperature=0", "ld:temperature=nan", "none:weight=1"]
LOSSES += ["cwd;weight=1", "cwd:weight=1:2", "cwd:weight==1", "cwd:=1", "cwd weight=1", "CWD"]


@pytest.mark.parametrize("spec", LOSSES)
def test_a_malformed_loss(refused: Refused, few_cache: Path, spec: str) -> None:
    assert "loss" in refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--loss", spec, *QUICK)


def test_none_stands_alone(refused: Refused, few_cache: Path) -> None:
    words = ["--loss", "none", "--loss", "cwd"]
    assert "none" in refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, *words, *QUICK)


# -- caches -----------------------------------------------------------------------------------------------------------


def edited(**changes: Any) -> Callable[[Path], None]:
    def change(cache: Path) -> None:
        content = json.loads((cache / MANIFEST).read_text())
        (cache / MANIFEST).write_text(json.dumps({**content, **changes}))

    return change


def other_format(cache: Path) -> None:
    content = json.loads((cache / ROOT).read_text())
    content["attributes"]["cache_kd"]["format"] = 99
    (cache / ROOT).write_text(json.dumps(content))


def becomes_a_file(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.write_text("a file")


CACHES: dict[str, Callable[[Path], Any]] = {
    "unfinished": lambda cache: (cache / MANIFEST).unlink(),
    "empty manifest": lambda cache: (cache / MANIFEST).write_text(""),
    "bytes as manifest": lambda cache: (cache / MANIFEST).write_bytes(bytes(range(256))),
    "list as manifest": lambda cache: (cache / MANIFEST).write_text("[]"),
    "deep manifest": lambda cache: (cache / MANIFEST).write_text("[" * 100_000),
    "cut manifest": lambda cache: (cache / MANIFEST).write_bytes((cache / MANIFEST).read_bytes()[:-100]),
    "folder as manifest": lambda cache: ((cache / MANIFEST).unlink(), (cache / MANIFEST).mkdir()),
    "manifest of another format": edited(format=99),
    "nan in the manifest": edited(imgsz=float("nan")),
    "huge number in the manifest": edited(num_images=10**400),
    "no root": lambda cache: (cache / ROOT).unlink(),
    "bytes as root": lambda cache: (cache / ROOT).write_bytes(bytes(range(256))),
    "root of others": lambda cache: (cache / ROOT).write_text('{"zarr_format": 3, "node_type": "group"}'),
    "other format": other_format,
    "a file": becomes_a_file,
}


@pytest.mark.parametrize("fault", CACHES)
@pytest.mark.parametrize("command", ["inspect", "train"])
def test_a_malformed_cache(refused: Refused, few_cache: Path, work: Path, command: str, fault: str) -> None:
    cache = Path(shutil.copytree(few_cache, work / "cache"))
    CACHES[fault](cache)
    words = {"train": ["train", "--student", "yolov8n.yaml", *QUICK, "--cache"]}.get(command, [command])
    assert "cache" in refused(*words, "cache").removeprefix("cache-kd: ")


@pytest.mark.parametrize("fault", CACHES)
def test_verify_of_a_malformed_cache_finds_its_fault(few_cache: Path, work: Path, fault: str) -> None:
    cache = Path(shutil.copytree(few_cache, work / "cache"))
    CACHES[fault](cache)
    before = refusals.everything_below(work)
    done = refusals.run("verify", "cache")
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output and "cache" in done.output
    assert refusals.everything_below(work) == before


VERIFY = [("--sample", "-1"), ("--sample", "0"), ("--teacher", "gone.pt"), ("--teacher", "."), ("--data", "gone.yaml")]


@pytest.mark.parametrize("words", VERIFY, ids=" ".join)
def test_a_malformed_option_of_verify(refused: Refused, few_cache: Path, words: tuple[str, str]) -> None:
    assert words[1] in refused("verify", few_cache, "--pixels", *words)


# -- students ---------------------------------------------------------------------------------------------------------

STUDENTS: dict[str, bytes | Mapping[str, Any]] = {
    "empty.yaml": b"",
    "broken.yaml": b"backbone: [\n",
    "list.yaml": b"- 1\n",
    "bytes.yaml": bytes(range(128, 256)),
    "text.yaml": b"yolov8n",
    "headless.yaml": {"nc": 3, "backbone": [[-1, 1, "Conv", [16, 3, 2]]]},
    "unknown.yaml": {"nc": 3, "backbone": [[-1, 1, "Nonsense", [16, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]},
    "beyond.yaml": {"nc": 3, "backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [[[7], 1, "Detect", ["nc"]]]},
    "words.yaml": {"nc": "x", "backbone": "Conv", "head": "Detect"},
    "classify.yaml": {"nc": 3, "backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [[-1, 1, "Classify", ["nc"]]]},
    "bytes.pt": bytes(range(256)),
    "empty.pt": b"",
    "text.pt": b"weights",
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_malformed_student(refused: Refused, few_cache: Path, tmp_path: Path, name: str) -> None:
    content = STUDENTS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(dict(content)).encode())
    assert name in refused("train", "--student", tmp_path / name, "--cache", few_cache, "--loss", "cwd", *QUICK)


@pytest.mark.parametrize(
    "student", ["folder.yaml", "folder.pt", "", ".", "yolov8q.yaml", "yolov8n.onnx", "yolov8n.yaml\0"]
)
def test_a_student_that_is_no_model(refused: Refused, few_cache: Path, tmp_path: Path, student: str) -> None:
    for name in ("folder.yaml", "folder.pt"):
        (tmp_path / name).mkdir()
    named = tmp_path / student if student.startswith("folder") else student
    assert "--student" in refused("train", "--student", named, "--cache", few_cache, "--loss", "cwd", *QUICK)


# -- the promise ------------------------------------------------------------------------------------------------------


def test_there_are_more_than_sixty() -> None:
    tables = (TEACHERS, DATA_FILES, LABELS, EXTRACT, TRAIN, USAGE, LOSSES, CACHES, CACHES, CACHES, VERIFY, STUDENTS)
    assert sum(map(len, tables)) >= PROMISED


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["extract", "--teacher", "gone.pt", *SMALL],
        ["extract", "--teacher", "bytes.pt", *SMALL],
        ["train", "--student", "yolov8n.yaml", "--cache", "bytes.pt"],
        ["verify", "."],
        ["inspect", "gone"],
    ],
    ids=" ".join,
)
def test_the_real_command_says_the_same(work: Path, words: list[str]) -> None:
    (work / "bytes.pt").write_bytes(bytes(range(256)))
    before = refusals.everything_below(work)
    done = subprocess.run(
        [sys.executable, "-m", "cache_kd", *words], cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
    assert line.startswith("cache-kd: ")
    assert refusals.everything_below(work) == before
