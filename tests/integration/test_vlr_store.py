"""`--store vlr` sends LD's valuable region too, and a cache without it says how to come by one that has it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from small_inputs import small_data
from student_runs import results, train_student

from cache_kd.cli import main
from cache_kd.errors import MismatchError
from cache_kd.losses.vlr import vlr_weights
from cache_kd.pipeline.opened import Cache

QUICK = ["epochs=1", "batch=4", "nbs=4", "val=False", "plots=False", "device=cpu"]
VLR = "ld:vlr=0.25"


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def valuable(cache: Cache, boxes: np.ndarray) -> np.ndarray:
    """Return (A,) bool: the region by the losses' own function, from the labels of the view."""
    head = cache.manifest.head
    weights = vlr_weights(
        [torch.from_numpy(boxes).float()],
        grids=[(64 // tap.stride, 64 // tap.stride) for tap in head.taps],
        strides=[tap.stride for tap in head.taps],
    )
    return (weights[0] > 0).numpy()


def test_the_region_is_sent_beside_what_is_sent_anyway(few_cache: Path, full_cache: Path) -> None:
    usual, more = Cache(few_cache), Cache(full_cache)
    added = 0
    for view in more.views:
        for index in range(more.manifest.num_images):
            plain = view.kind == "plain"
            before, after = (cache.read(view.number, index, plain=plain) for cache in (usual, more))
            assert before.pixel_hash == after.pixel_hash
            assert before.sent is not None and after.sent is not None
            region = valuable(more, more.dataset.sample(view, index).boxes)
            assert np.array_equal(after.sent, before.sent | region)
            added += int((region & ~before.sent).sum())
            assert before.scores is not None and after.scores is not None
            assert np.array_equal(before.scores[before.sent], after.scores[before.sent])
            assert after.boxes is not None
            assert after.boxes[region & ~before.sent].any(axis=1).all(), "their distributions are stored too"
    assert added > 0


@pytest.fixture
def beside(test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds the teacher and the data set under the names that a cache records."""
    folder = tmp_path / "my work"
    small_data(test_data / "data" / "bccd", folder / "set", train=3)
    shutil.copyfile(test_data / "weights" / "yolov8s-bccd.pt", folder / "best.pt")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CACHE_KD_CACHE", raising=False)
    return folder


def refusal(cache: str, loss: str) -> tuple[str, list[str]]:
    """Train with a loss that the cache cannot serve; return the line and the command in it."""
    done = invoke("train", "--student", "yolov8n.yaml", "--cache", cache, "--loss", loss, *QUICK)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    said, _, command = line.partition("a cache that has both old and new: ")
    words = shlex.split(command)
    assert words[:2] == ["cache-kd", "extract"]
    return said, words[1:]


@pytest.mark.parametrize(
    ("extra", "loss", "lacks", "gains"),
    [
        ([], VLR, "loss ld needs vlr, and the cache was extracted with --store features,logits", {"vlr"}),
        pytest.param(
            ["--store", "features"], VLR, "loss ld needs logits and vlr", {"logits", "vlr"}, marks=pytest.mark.slow
        ),
        (
            ["--taps", "C4", "--seed", "3", "--fidelity", "small", "degrees=5.0", "mosaic=0.5"],
            "cwd:layers=C3,C4",
            "loss cwd needs the layer C3, and the cache was extracted with --store features,logits --taps C4",
            {"C3"},
        ),
    ],
)
def test_the_command_that_is_said_makes_a_cache_that_serves_old_and_new(
    beside: Path, extra: list[str], loss: str, lacks: str, gains: set[str]
) -> None:
    data = Path("set") / "bccd.yaml"
    small = ["--imgsz", "64", "--batch", "4", "--views", "1", "--plain-views", "1", "--device", "cpu"]
    done = invoke("extract", "--teacher", "best.pt", "--data", data, *small, *extra, "--cache", "kd_cache/old")
    assert done.exit_code == 0, done.stderr
    said, command = refusal("kd_cache/old", loss)
    assert lacks in said
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr

    old = Cache("kd_cache/old").manifest
    (path,) = [path for path in Path("kd_cache").iterdir() if path.name != "old"]
    new = Cache(path).manifest
    differing = {key for key in old.identity if old.identity[key] != new.identity[key]}
    assert differing == {"codec"} and new.views == old.views
    assert set(new.codec["store"]) | set(new.codec["layers"]) == {
        *old.codec["store"],
        *old.codec["layers"],
        *gains,
    }
    trained = invoke("train", "--student", "yolov8n.yaml", "--loss", loss, "--loss", "mimic", "--cache", path, *QUICK)
    assert trained.exit_code == 0, trained.stderr
    (row,) = results(beside / "runs" / "detect" / "train")
    assert float(row["train/mimic_loss"]) > 0


def test_the_refusal_leaves_no_folder(few_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"loss ld needs vlr, .* --store features,logits,vlr$"):
        train_student(few_cache, tmp_path / "runs", VLR)
    assert not (tmp_path / "runs").exists()


def test_the_region_adds_to_the_term(full_cache: Path, tmp_path: Path) -> None:
    values = []
    for number, loss in enumerate(("ld", VLR)):
        run = train_student(
            full_cache, tmp_path / str(number), loss, epochs=1, close_mosaic=0, lr0=0.0, optimizer="SGD"
        )
        values.append(float(results(run.folder)[0]["train/ld_loss"]))
    assert values[1] > values[0] > 0


def test_exact_caches_serve_the_region_without_the_store(exact_cache: Path, tmp_path: Path) -> None:
    assert "vlr" not in Cache(exact_cache).manifest.codec["store"]
    run = train_student(exact_cache, tmp_path, VLR, "cwd:layers=C4", epochs=1)
    (row,) = results(run.folder)
    assert float(row["train/ld_loss"]) > 0
