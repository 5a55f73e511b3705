"""docs/your-own-model.md: every command does what is shown below it; the loss of docs/losses.md trains."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import refusals
import torch
from refusals import QUICK, SMALL, run
from small_inputs import build_model, save_model
from ultralytics.nn import tasks

from cache_kd import losses
from cache_kd.ultralytics_bridge.gate import import_user_modules

work = refusals.work
DOCS = Path(__file__).resolve().parents[2] / "docs"
OWN, LOSSES = ((DOCS / name).read_text(encoding="utf-8") for name in ("your-own-model.md", "losses.md"))
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"^```\w+\n# (?P<name>my_\w+\.\w+)\n(?P<content>.*?)^```$", re.M | re.S)


def sessions(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return (command, lines shown below it) of all console blocks."""
    found: list[tuple[str, list[str]]] = []
    for block in CONSOLE.findall(text):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return [(command, tuple(shown)) for command, shown in found]


REFUSED = [(command, shown) for command, shown in sessions(OWN) if shown[0].startswith("cache-kd: ")]
DONE = [(command, shown) for command, shown in sessions(OWN) if not shown[0].startswith("cache-kd: ")]


@contextmanager
def classes_forgotten() -> Iterator[None]:
    """Forget afterwards what --import made known inside."""
    safe = torch.serialization.get_safe_globals()
    before, modules = dict(vars(tasks)), set(sys.modules)
    try:
        yield
    finally:
        for name in set(vars(tasks)) - set(before):
            delattr(tasks, name)
        for name in set(sys.modules) - modules:
            if name.startswith("my_"):
                del sys.modules[name]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(safe)


@pytest.fixture(scope="module")
def prepared(few_images: Path, few_cache: Path, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page: its files, a teacher, a data set, caches."""
    folder = tmp_path_factory.mktemp("own_model")
    for match in FILE.finditer(OWN + LOSSES):
        (folder / match["name"]).write_text(match["content"])
    shutil.copytree(few_images.parent, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cache"))
    shutil.copyfile(test_data / "weights" / "yolov8s-bccd.pt", folder / "best.pt")
    shutil.copytree(few_cache, folder / "kd_cache" / "bccd-best")
    with classes_forgotten():
        import_user_modules([folder / "my_modules.py"])
        model = build_model(str(folder / "my_student.yaml"))
        save_model(model, folder / "custom.pt", data="bccd.yaml", imgsz=64)
    coco, data = test_data / "weights" / "yolov8n-int8deq.pt", folder / "bccd.yaml"
    done = run("extract", *SMALL, "--teacher", coco, "--data", data, "--cache", folder / "coco_on_bccd")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def here(prepared: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a copy of the folder; what a command imports is forgotten afterwards."""
    shutil.copytree(prepared, work, dirs_exist_ok=True)
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    with classes_forgotten():
        yield


def pattern(line: str) -> str:
    """Return the expression of a shown line, in which … stands for anything."""
    return ".*".join(map(re.escape, line.split("…")))


def quickly(command: str) -> list[str]:
    """Return the words of a command, made small where the page leaves the size open."""
    _, name, *words = shlex.split(command)
    return [name, *SMALL, *words] if name == "extract" else [name, *words, *QUICK]


@pytest.mark.parametrize(("command", "shown"), REFUSED, ids=[command for command, _ in REFUSED])
def test_it_is_refused_with_the_line_that_is_shown(command: str, shown: tuple[str, ...], here: None) -> None:
    done = run(*quickly(command))
    assert done.exit_code == 1, done.output
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("cache-kd: "))
    assert re.fullmatch(pattern(shown[0]), line), line
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "shown"), DONE, ids=[command for command, _ in DONE])
def test_it_works_as_is_shown(command: str, shown: tuple[str, ...], here: None) -> None:
    done = run(*quickly(command))
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(any(re.fullmatch(pattern(line), said) for said in lines) for line in shown)


def test_the_page_shows_both() -> None:
    assert len(REFUSED) > 8 and len(DONE) > 4


def test_the_loss_of_the_docs_is_trained(here: None) -> None:
    (command,) = re.findall(r"^cache-kd train .*--import my_loss\.py.*$", LOSSES, re.M)
    done = run(*quickly(command))
    assert done.exit_code == 0, done.stderr
    header, row = Path("runs/detect/train/results.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(values["train/cosine_loss"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("student", ["yolov5n.yaml", "yolov6n.yaml", "yolov9t.yaml", "yolo12n.yaml"])
def test_families_with_the_same_head_train(student: str, here: None) -> None:
    done = run(*quickly(f"cache-kd train --student {student}"))
    assert done.exit_code == 0, done.stderr
