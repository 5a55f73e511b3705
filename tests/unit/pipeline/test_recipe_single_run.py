"""One run of a recipe: where it goes on, what it throws away first, and what its seconds and warnings add up to."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
from recipe_runs import task

from cache_kd.errors import MismatchError, MissingFileError
from cache_kd.pipeline.recipes import single_run
from cache_kd.pipeline.recipes.plan import LOG, RunTask
from cache_kd.pipeline.recipes.single_run import carry_out, collected_warnings
from cache_kd.report.record import FILE, STATE, Judgement, RunRecord
from cache_kd.ultralytics_bridge.data import split_files

ROWS = "epoch,time,metrics/mAP50-95(B)\n1,5.0,0.1\n2,2.0,0.2\n"


@pytest.fixture
def trained() -> list[int | None]:
    """The epochs, from 0, at which trainings went on; None for one from the start."""
    return []


@pytest.fixture
def run(tmp_path: Path, trained: list[int | None], monkeypatch: pytest.MonkeyPatch) -> RunTask:
    """A run whose training only writes its table, and whose judge is kind; nothing is there to go on with."""
    one = task(tmp_path / "runs" / "mine")

    def train(given: RunTask, last: Path, epoch: int | None) -> None:
        trained.append(epoch)
        (Path(given.folder) / "results.csv").write_text(ROWS)

    monkeypatch.setattr(single_run, "_train", train)
    monkeypatch.setattr(single_run, "_judged", lambda given: Judgement("last", given.split, 0.5, 0.75))
    monkeypatch.setattr(single_run, "epoch_to_resume", lambda last, epochs: None)
    Path(one.folder).mkdir(parents=True)
    return one


def test_a_run_that_left_no_checkpoint_begins_again_from_nothing(run: RunTask, trained: list[int | None]) -> None:
    folder = Path(run.folder)
    (folder / "weights").mkdir()
    for name in ("results.csv", LOG):
        (folder / name).write_text("old\n")
    (folder / "results.csv").unlink()
    record = carry_out(run)
    assert trained == [None]
    assert not (folder / "weights").exists()
    assert (folder / LOG).read_text() == "old\n"
    assert record == RunRecord.read(folder / FILE)
    assert not (folder / STATE).exists()


def test_the_clock_of_a_resumed_run_goes_on(run: RunTask) -> None:
    assert [epoch.seconds for epoch in carry_out(run).epochs] == [5.0, 7.0]


def test_a_run_goes_on_at_its_epoch(run: RunTask, trained: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_run, "epoch_to_resume", lambda last, epochs: 1)
    (Path(run.folder) / "results.csv").write_text(ROWS)
    record = carry_out(run)
    assert trained == [1]
    assert (record.cost.seconds or 0) > 7


def test_a_run_whose_files_do_not_fit_begins_again_and_says_so(
    run: RunTask, trained: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly = single_run._train

    def train(given: RunTask, last: Path, epoch: int | None) -> None:
        if epoch is not None:
            raise MismatchError("other adapters")
        plainly(given, last, epoch)

    monkeypatch.setattr(single_run, "_train", train)
    monkeypatch.setattr(single_run, "epoch_to_resume", lambda last, epochs: 1)
    record = carry_out(run)
    assert trained == [None]
    assert record.warnings == ("plain-s0 cannot go on and begins again: other adapters",)


@pytest.mark.parametrize("noted", [True, False])
def test_a_trained_run_is_only_judged(
    run: RunTask, trained: list[int | None], monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    folder = Path(run.folder)
    (folder / "results.csv").write_text(ROWS)
    monkeypatch.setattr(single_run, "epoch_to_resume", lambda last, epochs: epochs)
    if noted:
        state = {
            "fingerprint": run.fingerprint, "started": "2026-11-21T10:00:00+00:00", "warnings": ["before"],
            "trained": True, "seconds": 100.0, "teacher_forwards": 0,
        }  # fmt: skip
        (folder / STATE).write_text(json.dumps(state))
    record = carry_out(run)
    assert trained == []
    assert record.judged is not None
    assert record.judged.map50 == 0.75
    if noted:
        assert record.warnings == ("before",)
        assert 100 <= (record.cost.seconds or 0) < 160


def test_warnings_of_all_three_are_collected() -> None:
    with collected_warnings() as said:
        logging.getLogger("cache_kd.x").warning("one  of %s", "ours")
        logging.getLogger("ultralytics").warning("theirs")
        warnings.warn("python's", UserWarning, stacklevel=1)
        logging.getLogger("cache_kd").info("not this")
    logging.getLogger("cache_kd").warning("nor this")
    assert said[:2] == ["one of ours", "theirs"]
    assert "python's" in said[2]
    assert len(said) == 3


def test_an_image_that_is_listed_and_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("./a.png\n")
    with pytest.raises(MissingFileError, match=r"`val:` lists .*a\.png, which is not there"):
        split_files({"val": str(tmp_path / "val.txt")}, "val")
    (tmp_path / "a.png").touch()
    images, labels = split_files({"val": str(tmp_path / "val.txt")}, "val")
    assert (images, [Path(label).name for label in labels]) == ([str(tmp_path / "a.png")], ["a.txt"])
