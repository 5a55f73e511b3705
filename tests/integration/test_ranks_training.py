"""Two processes train the student that one does: same views, same losses, one set of files; they end together, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_ranks import CpuRanks, Recorded, StillAlone, StillFull, StillRanks, train_as
from small_inputs import build_model, save_model, small_data
from student_runs import differing, gradients, results
from ultralytics.utils import RANK, USER_CONFIG_DIR

from cache_kd.errors import AlarmError, CacheKDError, SettingError
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import extract
from cache_kd.ultralytics_bridge.launch import RankRun, check_shared_batch, launch
from cache_kd.ultralytics_bridge.settings import check_device, check_one_device

IMAGES, ODD = 12, 11
STEPS, EPOCHS = 21, 7
SUMS = ("cwd", "pkd", "ld")


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "near"), [(5, 4), (1, 2), (-1, 16), (0.7, 16), (7, 6)])
def test_a_batch_that_cannot_be_dealt_out_is_refused(batch: float, near: int) -> None:
    with pytest.raises(SettingError, match=rf"^batch={batch} cannot be dealt out to 2 devices; .* as batch={near}$"):
        check_shared_batch(batch, 2)
    check_shared_batch(near, 2)


@pytest.mark.parametrize("device", ["0,1", (0, 1), [0, 1]])
def test_several_devices_are_refused_where_one_is_wanted(device: Any) -> None:
    with pytest.raises(SettingError, match=r"a cotrained run takes one device; allowed: one, as device=0$"):
        check_one_device(device, "a cotrained run")
    for one in (None, "cpu", 0, "0"):
        check_one_device(one, "a cotrained run")


@pytest.mark.parametrize("device", ["98,99", (98, 99)])
def test_devices_that_are_not_there_are_refused(device: Any) -> None:
    with pytest.raises(SettingError, match=r"cannot be used here; allowed: cpu"):
        check_device(device)


def test_a_refused_run_on_two_devices_leaves_nothing_behind(few_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="batch=5 cannot be dealt out to 2 devices"):
        train_as(CpuRanks, few_cache, tmp_path / "runs", "cwd", batch=5)
    assert not (tmp_path / "runs").exists()


# -- the same as one process ----------------------------------------------------------------------------------------


@dataclass
class Pair:
    """The same training in two processes, and in one that computes their parts of each batch one after the other."""

    ranks: list[dict[str, Any]]
    alone: dict[str, Any]
    full: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def pair(few_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Batch norms keep their statistics; twelve images make three whole batches of four."""
    folder = tmp_path_factory.mktemp("pair")
    # Ultralytics seeds a process by its rank: from a checkpoint both begin alike.
    start = save_model(build_model("yolov8n.yaml", imgsz=64), folder / "start.pt")
    shared: dict[str, Any] = {"student": str(start), "epochs": EPOCHS, "optimizer": "SGD", "lr0": 1e-3, "amp": False}
    run, ranks = train_as(StillRanks, few_cache, folder / "ranks", *SUMS, batch=4, nbs=4, **shared)
    _, (alone,) = train_as(StillAlone, few_cache, folder / "alone", *SUMS, batch=2, nbs=4, **shared)
    _, (full,) = train_as(
        StillFull, few_cache, folder / "full", *SUMS, batch=4, nbs=4, **{**shared, "epochs": 1, "close_mosaic": 0}
    )
    return Pair(ranks, alone, full, run)


@pytest.mark.slow
def test_two_ranks_show_the_views_of_one_process_each_once(pair: Pair) -> None:
    first, second = (rank["batches"] for rank in pair.ranks)
    assert len(first) == len(second) == STEPS
    alone = [(batch["epoch"], batch["view"], batch["images"]) for batch in pair.alone["batches"]]
    dealt = [(b["epoch"], b["view"], b["images"]) for both in zip(first, second, strict=True) for b in both]
    assert dealt == alone
    for epoch in range(EPOCHS):
        images = [image for _, _, names in dealt[6 * epoch : 6 * epoch + 6] for image in names]
        assert len(set(images)) == len(images) == IMAGES
    # One process with whole batches shows the same images in the same steps.
    whole = [(batch["view"], sorted(batch["images"])) for batch in pair.full["batches"]]
    both = zip(first[:3], second[:3], strict=True)
    assert [(mine["view"], sorted(mine["images"] + theirs["images"])) for mine, theirs in both] == whole


@pytest.mark.slow
def test_losses_of_two_ranks_are_those_of_one_process_that_computes_their_parts(pair: Pair) -> None:
    dealt = [batch for both in zip(*(rank["batches"] for rank in pair.ranks), strict=True) for batch in both]
    for step, (theirs, mine) in enumerate(zip(dealt, pair.alone["batches"], strict=True)):
        assert theirs["items"] == pytest.approx(mine["items"], rel=1e-5 if step < 2 else 2e-3), step
        # Ultralytics multiplies by the processes what DDP divides by them.
        assert theirs["loss"] == pytest.approx(2 * mine["loss"], rel=1e-5 if step < 2 else 2e-3), step


@pytest.mark.slow
def test_a_sum_over_two_ranks_is_that_of_one_process_with_the_whole_batch(pair: Pair) -> None:
    """For terms that are means over images; the others divide by what the part of a batch holds, as stock losses do."""
    halves = [rank["batches"][0]["items"]["cwd_loss"] for rank in pair.ranks]
    assert sum(halves) / 2 == pytest.approx(pair.full["batches"][0]["items"]["cwd_loss"], rel=1e-5)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)


@pytest.mark.slow
def test_after_twenty_steps_two_ranks_hold_the_same_student_and_adapters_as_one_process(pair: Pair) -> None:
    first, second = pair.ranks
    for part in ("student", "adapters"):
        assert differing(first["end"][part], second["end"][part]) == []
        moved = 0.0
        for name, value in pair.alone["end"][part].items():
            if not value.is_floating_point():
                continue
            start = pair.alone["start"][part][name]
            far = float((value - start).norm())
            moved += far
            assert float((first["end"][part][name] - value).norm()) <= 0.02 * far + 1e-5, name
        assert moved > 0.1
    assert first["shares"] == second["shares"]
    assert first["shares"] == pytest.approx(pair.alone["shares"], rel=0.2)


# -- an odd number of images, two batches a step, a failure, and going on ----------------------------------------------


class OneFails(CpuRanks):
    """Its second process raises in the middle of the second epoch."""

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        if RANK == 1 and self.epoch == 1 and self.batches[-1]["epoch"] == 1:
            raise AlarmError("distillation term cwd is nan, said the test")
        return super().preprocess_batch(batch)


class OneDies(CpuRanks):
    """Its second process is killed before its first step."""

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().preprocess_batch(batch)


@dataclass
class Broken:
    """A run of four epochs that one process ended in the second: its line, its seconds, its folder and records."""

    line: str
    stderr: str
    seconds: float
    folder: Path
    sidecar: dict[str, Any]
    said: list[str]
    resumed: list[dict[str, Any]]


LOSSES = ("cwd", "ho", "mgd", "ld:balance=0.3")


@pytest.fixture(scope="module")
def broken(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broken]:
    """Eleven images on two processes: six each, one of them twice; batches of four and of two, two of them a step."""
    folder = tmp_path_factory.mktemp("broken")
    data = small_data(test_data / "data" / "bccd", folder / "set", train=ODD)
    teacher = test_data / "weights" / "yolov8s-bccd.pt"
    cache = folder / "cache"
    extract(ExtractSettings(teacher, data, cache, views=2, plain_views=1, imgsz=64, batch=4, workers=0, device="cpu"))
    with pytest.MonkeyPatch.context() as patch:
        caught: list[str] = []
        patch.setattr(sys.stderr, "write", caught.append)
        begun = time.monotonic()
        with pytest.raises(AlarmError) as error:
            train_as(OneFails, cache, folder / "runs", *LOSSES, epochs=4, batch=8, nbs=16, close_mosaic=1)
        seconds = time.monotonic() - begun
    run = folder / "runs" / "train"
    sidecar = torch.load(run / "weights" / "kd_last.pt", weights_only=True)
    said: list[str] = []
    _, resumed = train_as(
        CpuRanks, None, folder / "runs", student="", resume=str(run / "weights" / "last.pt"), save_dir=str(run),
        say=said.append,
    )  # fmt: skip
    yield Broken(str(error.value), "".join(caught), seconds, run, sidecar, said, resumed)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_with_its_one_line(broken: Broken) -> None:
    assert broken.line == "distillation term cwd is nan, said the test"
    assert broken.seconds < 120
    for noise in ("Traceback", "ChildFailedError", "Connection closed", "torch.distributed"):
        assert noise not in broken.stderr
    assert not list((USER_CONFIG_DIR / "DDP").glob("_temp_*"))


@pytest.mark.slow
def test_a_resumed_run_on_two_devices_goes_on_with_the_adapters_that_it_had(broken: Broken) -> None:
    assert broken.sidecar["epoch"] == 0
    first, second = broken.resumed
    for rank in (first, second):
        for name, value in broken.sidecar["state"].items():
            if torch.is_tensor(value):
                assert torch.equal(rank["start"]["adapters"][name], value), name
        assert [batch["epoch"] for batch in rank["batches"]] == [1, 1, 2, 2, 3, 3]
        assert [batch["view"] for batch in rank["batches"][::2]] == ["mixed-0001", "mixed-0000", "plain-0000"]


@pytest.mark.slow
def test_an_odd_number_of_images_is_padded_by_one_and_parts_are_equally_long(broken: Broken) -> None:
    first, second = (rank["batches"] for rank in broken.resumed)
    for start in range(0, 6, 2):
        mine, theirs = ([name for b in each[start : start + 2] for name in b["images"]] for each in (first, second))
        assert [len(b["images"]) for b in first[start : start + 2]] == [4, 2]
        assert [len(b["images"]) for b in second[start : start + 2]] == [4, 2]
        assert len(set(mine + theirs)) == ODD
        assert theirs[-1] == mine[0]  # the first image of the epoch's order stands at its end again


@pytest.mark.slow
def test_critics_generators_gains_and_student_are_equal_on_both(broken: Broken) -> None:
    first, second = broken.resumed
    assert differing(first["end"]["student"], second["end"]["student"]) == [
        name for name in first["end"]["student"] if "running_" in name
    ]  # batch norms see their own part, as in Ultralytics
    assert differing(first["end"]["adapters"], second["end"]["adapters"]) == []
    assert len(differing(first["start"]["adapters"], first["end"]["adapters"])) > 10
    assert first["shares"] == second["shares"]


@pytest.mark.slow
def test_files_are_written_once(broken: Broken) -> None:
    assert [row["epoch"] for row in results(broken.folder)] == ["1", "2", "3", "4"]
    assert [(row["epoch"], row["term"]) for row in gradients(broken.folder)] == [
        (str(epoch), name) for epoch in (1, 2, 3, 4) for name in ("cwd", "ho", "mgd", "ld")
    ]
    assert sorted(path.name for path in broken.folder.iterdir()) == [
        "args.yaml", "cache_kd.yaml", "kd_gradients.csv", "results.csv", "weights",
    ]  # fmt: skip
    assert sorted(path.name for path in (broken.folder / "weights").iterdir()) == ["best.pt", "kd_last.pt", "last.pt"]
    assert broken.said[-1] == "pixels: 36 of 36 items compared with the teacher's, all equal"


@pytest.mark.slow
def test_a_process_that_dies_without_a_word_is_named(few_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CacheKDError, match=r"one of 2, was ended by SIGKILL, as a machine does .* run the same command"
    ):
        train_as(OneDies, few_cache, tmp_path / "runs", "cwd", epochs=1)


# -- the real thing ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_hold_the_same_student_and_adapters(few_cache: Path, tmp_path: Path) -> None:
    """CUDA, NCCL and AMP, nothing replaced."""
    losses = ("cwd", "ho", "ld:balance=0.3")
    folder, (first, second) = train_as(Recorded, few_cache, tmp_path, *losses, epochs=4, device="0,1")
    moved = differing(first["start"]["adapters"], first["end"]["adapters"])
    assert len(moved) > 10
    assert differing(first["end"]["adapters"], second["end"]["adapters"]) == []
    assert all("running_" in name for name in differing(first["end"]["student"], second["end"]["student"]))
    assert len(results(folder)) == 4


# -- an end from outside --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminated_command_takes_its_processes_with_it(few_cache: Path, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from cpu_ranks import CpuRanks\n"
        "from cache_kd.pipeline import training\n"
        "training.DistillTrainer = CpuRanks\n"
        "from cache_kd.cli import main\n"
        "main()\n"
    )
    file = tmp_path / "command.py"
    file.write_text(script)
    words = ["train", "--student", "yolov8n.yaml", "--cache", str(few_cache), "--loss", "cwd"]
    settings = ["epochs=500", "batch=4", "val=False", "plots=False", "device=cpu"]
    process = subprocess.Popen(
        [sys.executable, str(file), *words, *settings], cwd=tmp_path, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    last = tmp_path / "runs/detect/train/weights/last.pt"
    limit = time.monotonic() + 200
    while not last.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    own = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert (process.returncode, len(own) >= 3) == (143, True), said
    *_, line = said.splitlines()
    assert line == f"cache-kd: terminated; go on after the last whole epoch: cache-kd train resume={last}"
    assert "Traceback" not in said
    assert [number for number in own if Path(f"/proc/{number}/cmdline").exists()] == []


def descendants(number: int) -> list[int]:
    """Return the ids of all processes below one."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(status.parent.name)] = int(fields[1])
    found = [child for child, parent in parents.items() if parent == number]
    return found + [below for child in found for below in descendants(child)]


# -- the launch itself ----------------------------------------------------------------------------------------------


def test_what_is_launched_is_carried_by_value_and_keeps_an_existing_folder(
    few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that Ultralytics writes is read by another Python, which builds the run and does its work."""
    from cache_kd.ultralytics_bridge import launch as module

    commands: list[list[str]] = []

    def one_process(command: list[str], folder: Path) -> tuple[int, str]:
        commands.append(command)
        environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        subprocess.run([sys.executable, command[-1]], env=environment, check=True)
        return 0, ""

    monkeypatch.setattr(module, "_watched", one_process)
    trainer: Any = Recorded.__new__(Recorded)
    trainer.args = SimpleNamespace(batch=4, exist_ok=True, device="0", epochs=3)
    trainer.model, trainer.callbacks, trainer.resume = "yolov8n.yaml", {}, False
    trainer.save_dir, trainer.world_size = tmp_path / "kept", 1
    trainer.save_dir.mkdir()
    word = "carried"
    # A local function: only by value can another Python have it.
    found = launch(trainer, lambda cfg, overrides, callbacks: {"word": word, "epochs": overrides["epochs"]})
    assert found == [{"word": word, "epochs": 3}]
    assert commands[0][1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "1"]
    assert trainer.save_dir.is_dir()
    assert not Path(commands[0][-1]).exists()
    assert not hasattr(RankRun, "folder")
