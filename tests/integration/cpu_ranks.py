"""In: a training. Out: the same on two processes that Ultralytics launches, with its device set-up turned to the CPU.

What is replaced: the choice of the devices, NCCL by gloo, DDP's `device_ids`, and the device of the last validation.
Everything else is what `device=0,1` runs: launch file, pickle, torchrun, trainer.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from student_runs import FAST, distiller_tensors
from torch import Tensor, nn
from ultralytics.engine import trainer as engine
from ultralytics.engine import validator
from ultralytics.utils import LOCAL_RANK, RANK
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.pipeline import training
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.student.loader import ViewSampler
from cache_kd.ultralytics_bridge.student import DistilledMixin
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

WORLD = 2
SEEN = "seen-{}.pt"


class _CpuTorch:
    """torch, in which every device is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(*_: Any) -> torch.device:
        return torch.device("cpu")


class Recorded(DistillTrainer):
    """Keeps, of every batch, epoch, view, images and raw terms, and at the end all tensors; in a file of its rank."""

    still_norms = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch.set_num_threads(1)
        self.batches: list[dict[str, Any]] = []

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = [Path(file).name for file in batch["im_file"]]
        self.batches.append({"epoch": self.epoch, "view": batch["kd_view"].name, "images": images})
        return super().preprocess_batch(batch)

    def _model_train(self) -> None:
        super()._model_train()
        if self.still_norms:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def run_callbacks(self, event: str) -> None:
        if event == "on_train_start":
            self.at_start = self._tensors()
        if event == "on_train_batch_end":
            items = {name: float(value) for name, value in self.loss_items.items()}
            self.batches[-1] |= {"loss": self.loss.item(), "items": items}
        super().run_callbacks(event)

    def train(self) -> None:
        super().train()
        kept = {"batches": self.batches, "start": self.at_start, "end": self._tensors()}
        shares = getattr(unwrap_model(self.model), "kd_shares", None)
        torch.save({**kept, "shares": shares}, self.save_dir.parent / SEEN.format(max(RANK, 0)))

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        live = unwrap_model(self.model)
        student = {name: value.clone() for name, value in live.state_dict().items() if torch.is_tensor(value)}
        kept = {"student": {name: value for name, value in student.items() if not name.startswith("kd.")}}
        return {**kept, "adapters": distiller_tensors(self)} if isinstance(live, DistilledMixin) else kept


class CpuRanks(Recorded):
    """On two processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size, self.ddp = WORLD, LOCAL_RANK == -1

    def _setup_ddp(self) -> None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60), rank=RANK, world_size=WORLD)

    def _setup_train(self) -> None:
        stock = engine.nn.parallel.DistributedDataParallel

        def on_cpu(model: nn.Module, *, device_ids: Any, **options: Any) -> nn.Module:
            return stock(model, **options)

        with mock.patch.object(engine.nn.parallel, "DistributedDataParallel", on_cpu):
            super()._setup_train()

    def final_eval(self) -> None:
        here = mock.Mock(current_device=lambda: 0)
        with (
            mock.patch.object(validator, "torch", _CpuTorch()),
            mock.patch.object(validator, "get_torch_device_backend", lambda _: here),
        ):
            super().final_eval()


class StillRanks(CpuRanks):
    """Its batch norms keep their statistics."""

    still_norms = True


class StillFull(Recorded):
    """One process with whole batches, whose batch norms keep their statistics."""

    still_norms = True


class DealtSampler(ViewSampler):
    """One process's: in each batch of `WORLD` · `size` items those of rank 0 come first, then those of rank 1."""

    size_of_part = 2

    def __iter__(self) -> Any:
        keys = list(super().__iter__())
        whole = WORLD * self.size_of_part
        for start in range(0, len(keys), whole):
            for rank in range(WORLD):
                yield from keys[start : start + whole][rank::WORLD]


class StillAlone(Recorded):
    """One process that computes what two do, one part of their batches after the other."""

    still_norms = True

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        if mode != "train":
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        with mock.patch("cache_kd.ultralytics_bridge.trainer.ViewSampler", DealtSampler):
            return super().get_dataloader(dataset_path, batch_size, rank, mode)


def train_as(
    kind: type[Recorded], cache: Path | None, project: Path, *losses: str, say: Any = lambda line: None, **settings: Any
) -> tuple[Path, list[dict[str, Any]]]:
    """Train by a kind of trainer; return the run's folder and what each process kept, by rank."""
    balance = settings.pop("balance", None)
    student = settings.pop("student", "yolov8n.yaml")
    every = {"project": str(project), **({} if "resume" in settings else FAST), **settings}
    wanted = TrainSettings(student, cache, losses=losses, balance=balance, threads=1, settings=every)
    threads = torch.get_num_threads()
    with mock.patch.object(training, "DistillTrainer", kind):
        try:
            folder = training.train(wanted, say=say).folder
        finally:
            torch.set_num_threads(threads)
    return folder, kept(folder.parent)


def kept(project: Path) -> list[dict[str, Any]]:
    """Return what the processes of the last run of a project kept."""
    load = partial(torch.load, weights_only=False)
    return [load(path) for path in sorted(project.glob(SEEN.format("*")))]
