"""A run's fingerprint changes with everything that decides its result, and with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache_kd.losses import LOSSES
from cache_kd.pipeline.recipes import identity
from cache_kd.pipeline.recipes.identity import cache_key, method_code, run_fingerprint, student_identity
from cache_kd.pipeline.recipes.recipe import CacheEntry

BASE: dict[str, Any] = {
    "mode": "cached",
    "student": {"stock": "yolov8n.yaml"},
    "teacher": None,
    "data": {},
    "cache": {"identity": "a", "views": [4, 1]},
    "losses": ("cwd:weight=5",),
    "balance": None,
    "settings": {"epochs": 3, "lr0": 0.01, "workers": 0, "plots": True},
    "seed": 0,
    "judge": {"weights": "last", "images": "b"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "plain"},
        {"student": {"stock": "yolov8s.yaml"}},
        {"teacher": "weights"},
        {"data": {"images": "c"}},
        {"cache": {"identity": "a", "views": [2, 1]}},
        {"cache": {"identity": "z", "views": [4, 1]}},
        {"losses": ("cwd:weight=6",)},
        {"balance": 0.3},
        {"settings": {**BASE["settings"], "lr0": 0.02}},
        {"settings": {**BASE["settings"], "momentum": 0.9}},
        {"seed": 1},
        {"judge": {"weights": "best", "images": "b"}},
        {"judge": {"weights": "last", "images": "z"}},
    ],
    ids=str,
)
def test_what_decides_the_result_changes_the_fingerprint(change: dict[str, Any]) -> None:
    assert run_fingerprint(**{**BASE, **change}) != run_fingerprint(**BASE)


@pytest.mark.parametrize("change", [{"plots": False}, {"device": "0"}, {"verbose": False}, {"workers": 2}], ids=str)
def test_what_only_shows_or_places_a_run_does_not(change: dict[str, Any]) -> None:
    changed = {**BASE, "settings": {**BASE["settings"], **change}}
    assert run_fingerprint(**changed) == run_fingerprint(**BASE)


def test_workers_decide_what_the_stock_loader_shows() -> None:
    stock = {**BASE, "mode": "plain", "losses": (), "cache": None}
    assert run_fingerprint(**stock) != run_fingerprint(**{**stock, "settings": {**BASE["settings"], "workers": 2}})


def test_one_spelling_of_a_loss_is_as_good_as_another() -> None:
    weight = LOSSES["cwd"].default_weight
    named = run_fingerprint(**{**BASE, "losses": ("cwd",)})
    assert run_fingerprint(**{**BASE, "losses": (f"cwd:weight={weight}",)}) == named


@pytest.mark.parametrize("where", ["mine.py", "beside.py"])
def test_code_counts_and_comments_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def written(name: str, text: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.py").write_text("from cache_kd.losses.beside import f\nclass Mine:\n    x = 1\n")
        (folder / "beside.py").write_text("def f():\n    return 1\n")
        with (folder / where).open("a") as file:
            file.write(text)
        monkeypatch.setitem(LOSSES, "mine", type("Mine", (), {}))
        monkeypatch.setattr(identity.inspect, "getfile", lambda _: str(folder / "mine.py"))
        return method_code("mine")

    before = written("0", "")
    assert written("1", "# a remark\n") == before
    assert written("2", "def g():\n    '''Say.'''\n    return 2\n") != before
    assert written("3", "def g():\n    return 2\n") == written("4", "def g():\n    '''Say.'''\n    return 2\n")


def test_what_a_loss_says_of_itself_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(name: str, text: str) -> str:
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        monkeypatch.setitem(LOSSES, "mine", type("Mine", (), {}))
        monkeypatch.setattr(identity.inspect, "getfile", lambda _: str(file))
        monkeypatch.setattr(identity, "_made_of", lambda _: {file.rename(tmp_path / "mine.py")})
        identity._code.cache_clear()
        return method_code("mine")

    before = written("0", "class Mine:\n    default_weight = 2.7\n    cost = 'little'\n    needs = 'a'\n")
    assert written("1", "class Mine:\n    default_weight = 5.4\n    cost = 'much'\n    needs = 'a'\n") == before
    assert written("2", "class Mine:\n    default_weight = 2.7\n    cost = 'little'\n    needs = 'b'\n") != before
    assert written("3", "cost = 1\nclass Mine:\n    needs = 'a'\n") != written("4", "class Mine:\n    needs = 'a'\n")


def test_every_loss_has_code_of_its_own() -> None:
    assert len({method_code(name) for name in LOSSES}) == len(LOSSES)


def test_a_student_is_its_files_content(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"1")
    (tmp_path / "b.pt").write_bytes(b"1")
    same = student_identity(str(tmp_path / "a.pt"))
    assert student_identity(str(tmp_path / "b.pt")) == same
    (tmp_path / "b.pt").write_bytes(b"2")
    assert student_identity(str(tmp_path / "b.pt")) != same
    assert student_identity("yolov8n.yaml") == {"stock": "yolov8n.yaml"}


def test_a_recoded_cache_is_what_it_comes_from_and_how() -> None:
    entries = {
        "fine": CacheEntry("fine", None, {"views": 4}),
        "coarse": CacheEntry("coarse", "fine", {"fidelity": "tiny"}),
        "less": CacheEntry("less", "coarse", {"store": ["logits"]}),
    }
    assert cache_key("fine", {"fine": "a"}, entries) == {"identity": "a"}
    key = cache_key("less", {"fine": "a"}, entries)
    assert key == {"from": {"from": {"identity": "a"}, "fidelity": "tiny"}, "store": ["logits"]}
