"""An interrupted training goes on with the same adapters, at the right epoch, on the right view."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from student_runs import (
    FAST,
    Interrupt,
    differing,
    distiller_tensors,
    flat,
    gradients,
    interrupt_at,
    results,
    resume,
    train_student,
)
from torch import Tensor
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.cli import main
from cache_kd.errors import MismatchError, SettingError
from cache_kd.pipeline import training
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

LOSSES = ("cwd", "ld")
VIEWS = [View("mixed", 0), View("mixed", 1), View("mixed", 0), View("plain", 0)]
BATCHES = 3


@pytest.fixture(scope="module")
def interrupted_once(few_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four epochs that ended in the middle of its third."""
    project = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Interrupt, match="cache-kd train resume="):
        train_student(few_cache, project, *LOSSES, epochs=4, before_batch=interrupt_at(2, 1))
    return project / "train"


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(interrupted_once, tmp_path / "runs" / "train"))


def zeros(state: dict[str, Any]) -> dict[str, Any]:
    """Return a distiller's state with every tensor at 0, numbers as they were."""
    return {name: value * 0 if isinstance(value, Tensor) else value for name, value in state.items()}


def test_a_resumed_run_goes_on_where_it_was(interrupted: Path) -> None:
    held = torch.load(interrupted / "weights" / "kd_last.pt", weights_only=True)
    assert held["epoch"] == 1
    first: list[dict[str, Tensor]] = []

    def keep(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        if not first:
            first.append(distiller_tensors(trainer))

    run = resume(interrupted, before_batch=keep)
    assert differing(first[0], flat(held["state"])) == []
    assert run.shown == [(epoch, VIEWS[epoch]) for epoch in (2, 3) for _ in range(BATCHES)]
    rows = results(interrupted)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row[f"train/{name}_loss"]) > 0 for row in rows for name in LOSSES)


def test_momenta_of_student_and_adapters_are_restored(interrupted: Path) -> None:
    moments: list[int] = []

    def count(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        if not moments:
            held = trainer.optimizer.state
            wanted = [p for p in unwrap_model(trainer.model).parameters() if p.requires_grad]
            moments.append(sum(p not in held for p in wanted))
            for group in trainer.optimizer.param_groups:
                for p in group["params"]:
                    assert all(v.shape == p.shape for v in held[p].values() if torch.is_tensor(v) and v.ndim)

    resume(interrupted, before_batch=count)
    assert moments == [0]


def test_adapters_of_another_epoch_are_refused(interrupted: Path) -> None:
    sidecar = interrupted / "weights" / "kd_last.pt"
    held = torch.load(sidecar, weights_only=True)
    torch.save({**held, "epoch": 0}, sidecar)
    with pytest.raises(MismatchError, match=r"kd_last\.pt does not hold the adapters of epoch 2, at which .*last\.pt"):
        resume(interrupted)
    sidecar.unlink()
    with pytest.raises(MismatchError, match=r"kd_last\.pt does not hold the adapters of epoch 2"):
        resume(interrupted)
    assert (interrupted / "weights" / "last.pt").is_file()


def test_a_kill_between_the_two_files_is_survived(interrupted: Path) -> None:
    weights = interrupted / "weights"
    right = torch.load(weights / "kd_last.pt", weights_only=True)
    (weights / "kd_last.pt").rename(weights / "kd_last.pt.next")
    torch.save({"epoch": 0, "state": zeros(right["state"])}, weights / "kd_last.pt")
    first: list[dict[str, Tensor]] = []

    def stop(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        first.append(distiller_tensors(trainer))
        raise Interrupt

    with pytest.raises(Interrupt, match="cache-kd train resume="):
        resume(interrupted, before_batch=stop)
    assert differing(first[0], flat(right["state"])) == []


def test_adapters_written_for_an_epoch_that_was_not_finished_are_left_aside(interrupted: Path) -> None:
    weights = interrupted / "weights"
    right = torch.load(weights / "kd_last.pt", weights_only=True)
    torch.save({"epoch": 2, "state": zeros(right["state"])}, weights / "kd_last.pt.next")
    first: list[dict[str, Tensor]] = []

    def stop(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        first.append(distiller_tensors(trainer))
        raise Interrupt

    with pytest.raises(Interrupt, match="cache-kd train resume="):
        resume(interrupted, before_batch=stop)
    assert differing(first[0], flat(right["state"])) == []


def test_the_sidecar_is_on_disk_before_the_checkpoint(few_cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[tuple[bool, bool]] = []
    stock = DistillTrainer.__mro__[1].save_model

    def look(self: DistillTrainer) -> Any:
        saved = stock(self)
        seen.append(((self.wdir / "kd_last.pt.next").exists(), self.last.exists()))
        return saved

    monkeypatch.setattr(DistillTrainer.__mro__[1], "save_model", look)
    run = train_student(few_cache, tmp_path, "cwd", epochs=1)
    assert seen == [(True, True)]
    assert not (run.trainer.wdir / "kd_last.pt.next").exists()


@pytest.mark.parametrize("words", [["--loss", "mimic"], ["--loss", "cwd:weight=3", "--loss", "ld"], ["--loss", "none"]])
def test_other_losses_are_refused_in_one_line(interrupted: Path, words: list[str]) -> None:
    last = interrupted / "weights" / "last.pt"
    done = CliRunner().invoke(main, ["train", f"resume={last}", *words])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"cache-kd: {last} was trained with cwd:weight=")
    assert "--loss says" in line and "leave --loss out" in line


def test_the_same_losses_are_accepted(interrupted: Path) -> None:
    with pytest.raises(Interrupt, match="cache-kd train resume="):
        resume(interrupted, *LOSSES, before_batch=interrupt_at(2, 0))


def test_another_cache_is_refused(interrupted: Path, few_cache: Path, tmp_path: Path) -> None:
    record = interrupted / "cache_kd.yaml"
    text = record.read_text()
    identity = next(line.split()[1] for line in text.splitlines() if line.startswith("identity:"))
    record.write_text(text.replace(identity, "f" * 64))
    with pytest.raises(MismatchError, match=r"was trained from cache ffffffff, .* is [0-9a-f]{8}; name the first one"):
        resume(interrupted)


def test_a_run_that_is_not_ours_cannot_be_resumed(interrupted: Path) -> None:
    (interrupted / "cache_kd.yaml").unlink()
    with pytest.raises(MismatchError, match=r"cache_kd\.yaml is missing, so this is no run of cache-kd"):
        resume(interrupted)


def test_a_finished_run_cannot_be_resumed(few_cache: Path, tmp_path: Path) -> None:
    run = train_student(few_cache, tmp_path, "cwd", epochs=1)
    with pytest.raises(MismatchError, match="the run of 1 epochs is finished, there is nothing to resume"):
        resume(run.folder)
    assert run.trainer.last.is_file()


def test_a_plain_run_is_resumed_as_a_plain_run(few_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupt, match="cache-kd train resume="):
        train_student(few_cache, tmp_path, "none", epochs=3, before_batch=interrupt_at(1, 1))
    run = resume(tmp_path / "train")
    assert run.shown == [(epoch, view) for epoch, view in ((1, VIEWS[1]), (2, VIEWS[3])) for _ in range(BATCHES)]
    assert not hasattr(unwrap_model(run.trainer.model), "kd")


def test_recovery_from_nan_shows_the_same_view_again_with_the_adapters_of_the_epoch_before(
    few_cache: Path, tmp_path: Path
) -> None:
    poisoned: list[int] = []
    restored: list[bool] = []

    def poison(trainer: DistillTrainer, batch: dict[str, Any]) -> None:
        student = unwrap_model(trainer.model)
        if trainer.epoch == 1 and len(poisoned) < BATCHES:
            poisoned.append(1)
            with torch.no_grad():
                student.model[0].conv.weight.fill_(float("nan"))
                for value in student.kd.parameters():
                    value.fill_(7.0)
        elif trainer.epoch == 1 and not restored:
            held = torch.load(trainer.wdir / "kd_last.pt", weights_only=True)
            restored.append(held["epoch"] == 0 and not differing(distiller_tensors(trainer), flat(held["state"])))

    run = train_student(few_cache, tmp_path, *LOSSES, epochs=3, before_batch=poison)
    epochs = (0, 1, 1, 2)
    assert run.shown == [(e, [VIEWS[0], VIEWS[1], VIEWS[3]][e]) for e in epochs for _ in range(BATCHES)]
    assert restored == [True]
    assert [row["epoch"] for row in results(run.folder)] == ["1", "2", "3"]


def test_a_killed_process_is_resumed_from_the_command_line(few_cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cache_kd", "train"]
    settings = [f"{key}={value}" for key, value in {**FAST, "epochs": 60, "close_mosaic": 0}.items()]
    losses = [word for name in LOSSES for word in ("--loss", name)]
    folder = tmp_path / "runs" / "detect" / "train"
    sidecar = folder / "weights" / "kd_last.pt"
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "--student", "yolov8n.yaml", "--cache", str(few_cache), *losses, *settings],
            cwd=tmp_path, stdout=log, stderr=log,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not sidecar.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sidecar.exists(), (tmp_path / "log.txt").read_text()
    done = torch.load(folder / "weights" / "last.pt", weights_only=False)["epoch"] + 1
    assert 1 <= done < 60
    with pytest.raises(Interrupt, match="cache-kd train resume="):
        resume(folder, before_batch=interrupt_at(done + 1, 0))
    assert [row["epoch"] for row in results(folder)] == [str(n + 1) for n in range(done + 1)]


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        interrupt = KeyboardInterrupt()
        interrupt.add_note("go on so")
        raise interrupt

    monkeypatch.setattr(training, "train", interrupted)
    done = CliRunner().invoke(main, ["train", "--student", "yolov8n.yaml"])
    assert done.exit_code == 130
    assert done.stderr == "cache-kd: interrupted; go on so\n"


def test_an_epoch_that_is_done_again_is_noted_once(interrupted: Path) -> None:
    """Killed after the rows of an epoch and before its checkpoint; the machine's crash tore another row."""
    for table, row in (("results.csv", "3,1.5,1,1,1\n4,2"), ("kd_gradients.csv", "3,cwd,0.1,1\n3,ld,0.1,1\n")):
        with (interrupted / table).open("a", encoding="utf-8") as file:
            file.write(row)
    resume(interrupted)
    assert [row["epoch"] for row in results(interrupted)] == ["1", "2", "3", "4"]
    assert [(row["epoch"], row["term"]) for row in gradients(interrupted)] == [
        (str(epoch), name) for epoch in range(1, 5) for name in LOSSES
    ]


def test_a_second_kill_after_a_resume_finds_its_adapters(interrupted: Path) -> None:
    """The first kill came before the adapters' file was the last one, the second one before the next checkpoint."""
    weights = interrupted / "weights"
    right = torch.load(weights / "kd_last.pt", weights_only=True)
    (weights / "kd_last.pt").rename(weights / "kd_last.pt.next")
    torch.save({"epoch": 0, "state": zeros(right["state"])}, weights / "kd_last.pt")
    (weights / "last.pt.next").write_bytes(b"torn")
    with pytest.raises(Interrupt, match="cache-kd train resume="):
        resume(interrupted, before_batch=interrupt_at(2, 0))
    assert sorted(path.name for path in weights.iterdir()) == ["best.pt", "kd_last.pt", "last.pt"]
    torch.save({"epoch": 2, "state": zeros(right["state"])}, weights / "kd_last.pt.next")
    first: list[dict[str, Tensor]] = []

    def stop(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        first.append(distiller_tensors(trainer))
        raise Interrupt

    with pytest.raises(Interrupt, match="cache-kd train resume="):
        resume(interrupted, before_batch=stop)
    assert differing(first[0], flat(right["state"])) == []


def test_checkpoints_are_replaced_never_written_into(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the next epoch nor by the stripping at the end."""
    weights = tmp_path / "train" / "weights"
    kept: dict[Path, bytes] = {}

    def keep(moment: str) -> None:
        for name in ("last.pt", "best.pt", "kd_last.pt"):
            second = weights / f"{moment}-{name}"
            os.link(weights / name, second)
            kept[second] = second.read_bytes()

    def before(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        if trainer.epoch == 1 and not kept:
            keep("epoch")

    stock = DistillTrainer.__mro__[1].final_eval

    def final_eval(self: DistillTrainer) -> None:
        keep("end")
        stock(self)

    monkeypatch.setattr(DistillTrainer.__mro__[1], "final_eval", final_eval)
    train_student(few_cache, tmp_path, "cwd", epochs=2, before_batch=before)
    assert [path.name for path, content in kept.items() if path.read_bytes() != content] == []
    assert len(kept) == 6
    held = torch.load(weights / "last.pt", weights_only=False)
    assert held["epoch"] == -1 and held["optimizer"] is None
    assert not list(weights.glob("*.next"))


def test_fewer_views_are_those_of_a_smaller_cache_and_last_over_a_resume(few_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupt, match="cache-kd train resume="):
        train_student(few_cache, tmp_path, "none", views=1, epochs=5, before_batch=interrupt_at(2, 0), close_mosaic=1)
    folder = tmp_path / "train"
    assert yaml.safe_load((folder / "cache_kd.yaml").read_text())["views"] == ["mixed-0000", "plain-0000"]
    with pytest.raises(MismatchError, match=r"was trained with --views 1, not 2; leave --views out"):
        training.train(TrainSettings("", views=2, settings={"resume": str(folder / "weights/last.pt")}))
    rest = resume(folder)
    shown = [View("mixed", 0)] * 2 + [View("plain", 0)]
    assert rest.shown == [(epoch, view) for epoch, view in zip((2, 3, 4), shown, strict=True) for _ in range(BATCHES)]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"views": 3}, r"--views 3; the cache has 2 mixed views, allowed: 0 to 2; more: cache-kd extract"),
        ({"plain_views": 2}, r"--plain-views 2; the cache has 1 plain views, allowed: 0 to 1"),
        ({"views": 0, "plain_views": 0}, r"leaves nothing to show"),
    ],
)
def test_views_that_the_cache_lacks_are_refused(few_cache: Path, chosen: dict[str, int], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        training.train(TrainSettings("yolov8n.yaml", few_cache, **chosen))
