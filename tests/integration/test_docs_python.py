"""docs/python.md runs from top to bottom and prints what its comments say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import cache_kd
from cache_kd.errors import SettingError
from cache_kd.losses import LOSSES, parse_loss
from cache_kd.pipeline.opened import Cache

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
RECIPE = "## A recipe"


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (heading, code) of every Python block in order."""
    found = []
    for part in re.split(r"^(?=## )", text, flags=re.M):
        heading = part.splitlines()[0] if part.strip() else ""
        found += [(heading, code) for code in re.findall(r"^```python\n(.*?)^```$", part, re.M | re.S)]
    return found


@pytest.fixture
def folder(few_images: Path, bccd_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the page: a teacher, a data set, the recipe."""
    shutil.copytree(few_images.parent, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cache"))
    shutil.copyfile(bccd_teacher, tmp_path / "best.pt")
    shutil.copyfile(ROOT / "pipelines" / "smoke.yaml", tmp_path / "smoke.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CACHE_KD_CACHE", raising=False)
    return tmp_path


def run(chosen: list[tuple[str, str]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for heading, code in chosen:
        exec(compile(code, f"docs/python.md {heading}", "exec"), names)
    return names


def test_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run([(heading, code) for heading, code in blocks(TEXT) if not heading.startswith(RECIPE)])
    printed = capsys.readouterr().out
    cache = names["cache"]
    assert isinstance(cache, Cache) and cache.manifest.recipe["fliplr"] == 0.0
    for comment in re.findall(r"^print\(cache\.views\)  # (.*)$", TEXT, re.M):
        assert comment in printed
    assert [level.shape[1:] for level in names["targets"].features] == [(8, 8), (4, 4), (2, 2)]
    assert names["targets"].features[0].dtype.name == "float32"
    assert names["pixels"].shape == (3, 64, 64) and names["pixels"].dtype.name == "uint8"
    assert "no loss 'cwdd' in 'cwdd'; " in printed
    assert type(names["student"].model).__module__.startswith("ultralytics.")


@pytest.mark.slow
def test_the_recipe_of_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [(heading, code) for heading, code in blocks(TEXT) if heading.startswith(RECIPE)]
    names = run([("", "import cache_kd"), *recipe])
    assert {record.arm for record in names["result"].records} == {"plain", "cached", "online"}
    lines = capsys.readouterr().out.splitlines()
    assert "cached 0 val 0.0 0" in lines  # one epoch finds nothing; the teacher was not asked
    assert any(re.match(r"  1 [\d.]+ \{.*'cwd'", line) for line in lines)


def test_the_page_names_all_that_there_is() -> None:
    assert "five names" in TEXT and len(cache_kd.__all__) == 5
    for name in set(cache_kd.__all__) - {"Cache"}:
        assert f"cache_kd.{name}(" in TEXT


def test_training_takes_the_options_of_the_command(folder: Path, few_cache: Path) -> None:
    (folder / "my_loss.py").write_text("raise RuntimeError('this file was imported')\n")
    with pytest.raises(SettingError, match="this file was imported"):
        cache_kd.train(student="yolov8n.yaml", cache=few_cache, imports=["my_loss.py"])


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_fits_a_cache_of_the_defaults(name: str, few_cache: Path) -> None:
    needs = parse_loss(name).needs
    assert Cache(few_cache).codec.columns_for(needs, needed_by=name, command="cache-kd extract") or not needs
