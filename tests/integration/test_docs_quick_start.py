"""docs/quick-start.md and docs/looking.md: their commands work in their order and leave the files that they name."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import refusals
import yaml
from refusals import run

work = refusals.work
ROOT = Path(__file__).resolve().parents[2]
START, LOOKING = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("quick-start.md", "looking.md"))
SHORT = {"epochs=60": "epochs=2", "160": "64"}


def commands(text: str) -> list[list[str]]:
    """Return the words of every command in the page's blocks, `cache-kd` left out."""
    fenced = "\n".join(re.findall(r"^```\n(.*?)^```$", text, re.M | re.S))
    return [shlex.split(line)[1:] for line in re.findall(r"^(?:\$ )?(cache-kd .*)$", fenced, re.M)]


@pytest.mark.slow
def test_the_pages_work_in_their_order(few_images: Path, bccd_teacher: Path, work: Path) -> None:
    shutil.copytree(few_images.parent, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cache"))
    data = yaml.safe_load((work / "bccd.yaml").read_text())
    (work / "bccd.yaml").write_text(yaml.safe_dump({**data, "test": data["val"]}))  # what the recipe is judged on
    shutil.copyfile(bccd_teacher, work / "best.pt")
    shutil.copytree(ROOT / "pipelines", work / "pipelines")
    for words in commands(START):
        if "loss_ablation" in " ".join(words) and "--dry-run" not in words:
            continue  # hours
        small = [SHORT.get(word, word) for word in words]
        small += ["batch=4", "close_mosaic=1"] if words[0] == "train" else []
        done = run(*small)
        assert done.exit_code == 0, (words, done.stderr)
    (cache,) = (work / "kd_cache").iterdir()
    assert all((work / "runs" / "report" / f"report.{kind}").is_file() for kind in ("html", "md", "csv", "json"))
    assert (work / "runs" / "detect" / "cwd" / "train_batch0_teacher.jpg").is_file()
    shutil.copytree(work / "runs" / "detect" / "cwd", work / "runs" / "detect" / "train")
    for words in commands(LOOKING):
        if words[0] == "inspect":
            done = run(*[str(cache) if word.startswith("kd_cache/") else word for word in words])
            assert done.exit_code == 0, (words, done.stderr)
    named = set(re.findall(r"`([\w-]+\.png)`", LOOKING))
    assert len(named) == 6 and named == {file.name for file in (work / "pictures").iterdir()}
