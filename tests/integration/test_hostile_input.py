"""Files from others run nothing: each carries a canary, and is refused in one line that names it, or left unread."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files
import pytest
import refusals
import torch
import yaml
from hostile_files import Canary, data_yaml, label_cache, model_yaml
from refusals import run
from student_runs import train_student
from ultralytics.data.utils import load_dataset_cache_file
from ultralytics.nn import tasks
from ultralytics.nn.tasks import DetectionModel

from cache_kd.errors import CacheKDError

SMALL = ["--imgsz", "64", "--batch", "4", "--views", "1", "--plain-views", "0", "--device", "cpu"]
QUICK = ["epochs=1", "batch=4", "val=False", "plots=False", "device=cpu"]
WITH_VALIDATION = ["epochs=2", "batch=4", "plots=False", "device=cpu"]
Refused = Callable[..., str]


def own(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what cache_kd logged."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("cache_kd")]


work = refusals.work


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that a canary touches."""
    return tmp_path / "canary"


@pytest.fixture
def refused(mark: Path, work: Path) -> Refused:
    """Run a command that must fail; return its only line on stderr, after a look at the canary."""

    def check(*words: str | Path, naming: Path) -> str:
        done = run(*words)
        assert not mark.exists(), "the file ran code"
        assert done.exit_code == 1, (done.output, done.exception)
        assert isinstance(done.exception, SystemExit), done.exception
        (line,) = done.stderr.splitlines()
        assert line.startswith("cache-kd: ") and str(naming) in line
        assert "Traceback" not in done.output
        assert list(work.iterdir()) == []
        return line

    return check


# -- teacher ----------------------------------------------------------------------------------------------------------


def test_a_teachers_code_is_not_run(refused: Refused, few_images: Path, tmp_path: Path, mark: Path) -> None:
    file = hostile_files.checkpoint(tmp_path / "best.pt", mark)
    line = refused("extract", "--teacher", file, "--data", few_images, *SMALL, naming=file)
    assert "it names posix.system: --import your_modules.py or --trust-teacher" in line


def test_a_teacher_of_the_old_kind_is_not_run(refused: Refused, few_images: Path, tmp_path: Path, mark: Path) -> None:
    file = hostile_files.checkpoint_of_old_kind(tmp_path / "best.pt", mark)
    refused("extract", "--teacher", file, "--data", few_images, *SMALL, naming=file)


def test_verification_runs_no_code_of_a_teacher(refused: Refused, few_cache: Path, tmp_path: Path, mark: Path) -> None:
    file = hostile_files.checkpoint(tmp_path / "best.pt", mark)
    refused("verify", few_cache, "--teacher", file, naming=file)


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint_of_old_kind"])
def test_what_a_trusted_teacher_runs_is_said_before_it_runs(
    few_images: Path, tmp_path: Path, mark: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    file = getattr(hostile_files, kind)(tmp_path / "best.pt", mark)
    said: list[bool] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(mark.exists())

    logger = logging.getLogger("cache_kd.ultralytics_bridge.gate")
    watch = Watch()
    logger.addHandler(watch)
    try:
        run("extract", "--teacher", file, "--data", few_images, *SMALL, "--trust-teacher")
    finally:
        logger.removeHandler(watch)
    assert mark.exists(), "the canary is no canary"
    assert said == [False]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    runs = "posix.system" if kind == "checkpoint" else "names that cannot be listed"
    (line,) = own(caplog)
    assert line.startswith(f"teacher {file} (sha256 {sha256}) is loaded as code: ") and runs in line


# -- student ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint_of_old_kind", "checkpoint_with_code"])
def test_a_students_code_is_not_run(refused: Refused, few_cache: Path, tmp_path: Path, mark: Path, kind: str) -> None:
    file = getattr(hostile_files, kind)(tmp_path / "student.pt", mark)
    line = refused("train", "--student", file, "--cache", few_cache, *QUICK, naming=file)
    if kind != "checkpoint_of_old_kind":
        assert "--trust-student" in line


def test_pretrained_weights_run_no_code(refused: Refused, few_cache: Path, tmp_path: Path, mark: Path) -> None:
    file = hostile_files.checkpoint(tmp_path / "weights.pt", mark)
    words = ("train", "--student", "yolov8n.yaml", "--cache", few_cache, *QUICK)
    refused(*words, f"pretrained={file}", naming=file)


@pytest.mark.parametrize("field", ["activation", "module", "function", "argument", "tag"])
def test_a_student_yamls_code_is_not_run(
    refused: Refused, few_cache: Path, tmp_path: Path, mark: Path, field: str
) -> None:
    file = model_yaml(tmp_path / "student.yaml", mark, field)
    line = refused("train", "--student", file, "--cache", few_cache, *QUICK, naming=file)
    if field in ("activation", "function"):
        assert "it may run code, which only --trust-student allows" in line or "eval" in line


def test_a_yaml_canary_is_one_where_code_is_allowed(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "SAFE_LOAD", False)
    DetectionModel(str(model_yaml(tmp_path / "student.yaml", mark)), verbose=False)
    assert mark.exists()


def test_what_a_trusted_student_runs_is_said(
    few_cache: Path, tmp_path: Path, mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = model_yaml(tmp_path / "student.yaml", mark)
    run("train", "--student", file, "--cache", few_cache, *QUICK, "--trust-student", "imgsz=96")  # refused afterwards
    assert not mark.exists() and own(caplog) == []
    run("train", "--student", file, "--cache", few_cache, *QUICK, "--trust-student", "freeze=99")
    assert mark.exists()
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"student {file} (sha256 {sha256}) is loaded as code: its activation " in caplog.text
    assert "pathlib" in caplog.text


@pytest.mark.parametrize("student", ["https://example.org/student.yaml", "https://example.org/student.pt"])
def test_a_student_is_never_fetched(few_cache: Path, student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[object] = []
    monkeypatch.setattr("ultralytics.utils.downloads.safe_download", lambda *words, **_: fetched.append(words))
    done = run("train", "--student", student, "--cache", few_cache, *QUICK)
    assert (done.exit_code, fetched) == (1, [])
    assert done.stderr.startswith(f"cache-kd: --student {student}; allowed: a model YAML")


# -- data file --------------------------------------------------------------------------------------------------------


def downloads(mark: Path) -> dict[str, str]:
    script = mark.with_suffix(".sh")
    script.write_text(f"touch {mark}\n")
    return {
        "python": f"open({str(mark)!r}, 'w').close()",
        "bash": f"bash {script}",
        "url": "https://example.org/data.zip",
    }


@pytest.fixture
def fetches(mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something would be fetched, the canary is touched."""
    for module in ("data.utils", "utils.downloads"):
        monkeypatch.setattr(f"ultralytics.{module}.safe_download", lambda *_, **__: mark.touch())


@pytest.mark.parametrize("kind", ["python", "bash", "url"])
@pytest.mark.usefixtures("fetches")
def test_a_download_entry_is_not_followed(
    refused: Refused, few_images: Path, test_data: Path, few_cache: Path, tmp_path: Path, mark: Path, kind: str
) -> None:
    file = data_yaml(few_images, tmp_path / "data.yaml", downloads(mark)[kind], present=False)
    teacher = test_data / "weights" / "yolov8s-bccd.pt"
    line = refused("extract", "--teacher", teacher, "--data", file, *SMALL, naming=file)
    assert "its download: entry was not run (allow it: --allow-download)" in line
    refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--data", file, *QUICK, naming=file)


@pytest.mark.parametrize("kind", ["python", "bash", "url"])
@pytest.mark.usefixtures("fetches")
def test_a_download_entry_is_followed_where_that_is_allowed(
    few_images: Path, test_data: Path, tmp_path: Path, mark: Path, kind: str
) -> None:
    file = data_yaml(few_images, tmp_path / "data.yaml", downloads(mark)[kind], present=False)
    teacher = test_data / "weights" / "yolov8s-bccd.pt"
    run("extract", "--teacher", teacher, "--data", file, *SMALL, "--allow-download")
    assert mark.exists(), "the canary is no canary"


@pytest.mark.usefixtures("fetches")
def test_a_download_entry_is_ignored_while_the_images_are_there(
    few_images: Path, few_cache: Path, tmp_path: Path, mark: Path
) -> None:
    file = data_yaml(few_images, tmp_path / "data.yaml", downloads(mark)["python"], present=True)
    done = run("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--data", file, "--loss", "none", *QUICK)
    assert done.exit_code == 0, (done.output, done.exception)
    assert not mark.exists()


def test_images_that_vanish_while_it_trains_are_not_fetched(few_images: Path, few_cache: Path, tmp_path: Path) -> None:
    """Ultralytics looks at the data file again before the last validation."""
    mark = tmp_path / "canary"
    copy = Path(shutil.copytree(few_images.parent, tmp_path / "data"))
    content = yaml.safe_load((copy / few_images.name).read_text())
    file, link = copy / "other.yaml", copy / "images" / "link"
    link.symlink_to("val")
    file.write_text(yaml.safe_dump({**content, "val": "images/link", "download": f"open({str(mark)!r}, 'w').close()"}))

    def vanish(*_: object) -> None:
        link.unlink(missing_ok=True)

    with pytest.raises((CacheKDError, FileNotFoundError), match="images not found"):
        train_student(few_cache, tmp_path / "runs", "none", data=file, epochs=1, before_batch=vanish)
    assert not mark.exists()


# -- label caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_label_caches_are_neither_unpickled_nor_replaced(
    few_images: Path, test_data: Path, tmp_path: Path, mark: Path, split: str
) -> None:
    copy = Path(shutil.copytree(few_images.parent, tmp_path / "data", ignore=shutil.ignore_patterns("*.cache")))
    file, foreign = copy / few_images.name, label_cache(copy / "labels" / f"{split}.cache", mark)
    before = foreign.read_bytes()
    teacher = test_data / "weights" / "yolov8s-bccd.pt"
    for words in (
        ["extract", "--teacher", teacher, "--data", file, "--cache", tmp_path / "cache", *SMALL],
        ["verify", tmp_path / "cache", "--pixels", "--data", file],
        ["train", "--student", "yolov8n.yaml", "--cache", tmp_path / "cache", *WITH_VALIDATION],
    ):
        done = run(*words)
        assert done.exit_code == 0, (done.output, done.exception)
    assert not mark.exists()
    assert foreign.read_bytes() == before
    assert [path.name for path in copy.rglob("*.cache")] == [foreign.name], "another label cache was written"
    with pytest.raises(Exception, match=r"."):
        load_dataset_cache_file(foreign).item()
    assert mark.exists(), "the canary is no canary"


# -- foreign cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
        {"zarr_format": 2, "dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}]},
        {"data_type": "object"},
    ],
    ids=["codec", "zarr 2", "objects"],
)
@pytest.mark.parametrize("command", ["train", "verify"])
def test_a_foreign_caches_pickles_are_not_run(
    few_cache: Path, tmp_path: Path, mark: Path, metadata: dict[str, Any], command: str
) -> None:
    cache = Path(shutil.copytree(few_cache, tmp_path / "cache"))
    array = cache / "views" / "plain-0000" / "pixel_hash"  # the view of the only epoch
    shard = next(path for path in array.rglob("0") if path.is_file())
    shard.write_bytes(pickle.dumps(Canary(mark)).ljust(shard.stat().st_size, b"\0"))
    described = json.loads((array / "zarr.json").read_bytes())
    (array / "zarr.json").write_text(json.dumps({**described, **metadata}))
    words = ["--student", "yolov8n.yaml", "--cache", cache, *QUICK] if command == "train" else [cache]
    done = run(command, *words)
    assert not mark.exists(), "the cache ran code"
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    assert "Traceback" not in done.output
    if command == "train":
        (line,) = done.stderr.splitlines()
        assert line.startswith("cache-kd: ") and str(array) in line
    else:
        assert "views/plain-0000/pixel_hash/zarr.json: " in done.stdout
    pickle.loads(shard.read_bytes())
    assert mark.exists(), "the canary is no canary"


# -- in a process of its own ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "student.pt", "student.yaml"])
def test_a_real_process_says_one_line(few_images: Path, few_cache: Path, tmp_path: Path, mark: Path, kind: str) -> None:
    if kind == "student.yaml":
        file = model_yaml(tmp_path / "student.yaml", mark)
    else:
        file = hostile_files.checkpoint_of_old_kind(tmp_path / f"{kind[:7]}.pt", mark)
    extract = ["extract", "--teacher", file, "--data", few_images, *SMALL]
    train = ["train", "--student", file, "--cache", few_cache, *QUICK]
    words = [sys.executable, "-m", "cache_kd", *map(str, extract if kind == "teacher" else train)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not mark.exists(), "the file ran code"
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("cache-kd: ") and str(file) in line


# -- what a resumed run reads -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_once(few_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs that ended in the middle of its second, with best.pt."""

    def stop(trainer: object, _: object) -> None:
        if trainer.epoch == 1:  # type: ignore[attr-defined]  # a DistillTrainer
            raise KeyboardInterrupt

    project = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt, match="cache-kd train resume="):
        train_student(few_cache, project, "cwd", before_batch=stop, epochs=2)
    return project / "train"


@pytest.fixture
def folder(run_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_once, tmp_path / "runs" / "train"))


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "kd_last.pt"])
def test_no_checkpoint_of_a_resumed_run_is_run(refused: Refused, folder: Path, mark: Path, name: str) -> None:
    file = folder / "weights" / name
    content = torch.load(file if file.exists() else folder / "weights" / "last.pt", weights_only=False)
    torch.save({**content, "more": Canary(mark)}, file)
    line = refused("train", f"resume={folder / 'weights' / 'last.pt'}", naming=file)
    assert "posix.system" in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("losses: !!python/object/apply:os.system ['touch {mark}']\n", "is not a YAML file: could not determine"),
        (
            "losses: {{a: 1}}\ncache: [x]\n",
            "cache is not a text, identity is not a text, losses is not a list of texts",
        ),
        ("[" * 5000, "is not a YAML file"),
        ("cache: 2001-99-99\n", "is not a YAML file"),
    ],
    ids=["tag", "types", "nesting", "date"],
)
def test_a_hostile_record_of_a_run_is_one_line(
    refused: Refused, folder: Path, mark: Path, text: str, says: str
) -> None:
    record = folder / "cache_kd.yaml"
    record.write_text(text.format(mark=mark))
    assert says in refused("train", f"resume={folder / 'weights' / 'last.pt'}", naming=record)


def test_a_resumed_run_stays_in_its_folder(folder: Path, run_once: Path, tmp_path: Path) -> None:
    """The checkpoint names the folder in which it was trained; a copy from elsewhere must not be followed there."""
    before = sorted((path, path.stat().st_mtime_ns) for path in run_once.rglob("*"))
    done = run("train", f"resume={folder / 'weights' / 'last.pt'}")
    assert done.exit_code == 0, (done.output, done.exception)
    assert sorted((path, path.stat().st_mtime_ns) for path in run_once.rglob("*")) == before
    assert f"run: {folder}" in done.stdout


# -- nothing is installed ---------------------------------------------------------------------------------------------

INSTALL = """
import sys
from click.testing import CliRunner
import ultralytics.utils.checks as checks  # before cache_kd, as in a user's notebook
assert checks.AUTOINSTALL is True
checks.ONLINE = True
from cache_kd.cli import main
done = CliRunner().invoke(main, sys.argv[1:])
print(done.exit_code, done.stderr)
"""


def test_nothing_is_installed_whatever_the_environment_says(few_images: Path, tmp_path: Path, mark: Path) -> None:
    """Loading as code, Ultralytics installs what a checkpoint names; pip and uv are canaries here."""
    (tmp_path / "path" / "pip").mkdir(parents=True)  # found by python -m pip
    (tmp_path / "path" / "pip" / "__main__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    uv = tmp_path / "path" / "uv"
    uv.write_text(f"#!/bin/sh\ntouch {mark}\n")
    uv.chmod(0o755)
    module = tmp_path / "nowhere_to_be_found.py"
    module.write_text("class Thing:\n    pass\n")
    code = f"import sys, torch; sys.path.insert(0, {str(tmp_path)!r}); import nowhere_to_be_found as m; "
    teacher = tmp_path / "best.pt"
    subprocess.run([sys.executable, "-c", f"{code}torch.save({{'model': m.Thing()}}, {str(teacher)!r})"], check=True)
    module.unlink()
    environment = {
        **os.environ,
        "YOLO_AUTOINSTALL": "true",
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(tmp_path / "path"), os.environ["PATH"]]),
    }
    words = ["extract", "--teacher", teacher, "--data", few_images, *SMALL, "--trust-teacher"]
    done = subprocess.run(
        [sys.executable, "-c", INSTALL, *map(str, words)], env=environment, capture_output=True, text=True, check=True
    )
    assert "No module named 'nowhere_to_be_found'" in done.stdout and "\n1 " in f"\n{done.stdout}"
    assert not mark.exists()
