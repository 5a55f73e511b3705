"""In: a cache and losses. Out: a short training in this process, with its trainer and the views that it was shown."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.pipeline import training
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

FAST = {
    "epochs": 2,
    "batch": 4,
    "nbs": 4,  # every batch is a step
    "warmup_epochs": 0.0,
    "close_mosaic": 1,
    "val": False,
    "plots": False,
    "device": "cpu",
}


@dataclass
class Run:
    """What a training left: its folder, its trainer, and the (epoch, view) of every batch in order."""

    folder: Path
    trainer: DistillTrainer
    shown: list[tuple[int, View]] = field(default_factory=list)

    @property
    def student(self) -> dict[str, Tensor]:
        """Every tensor of the live student and of its EMA."""
        live = unwrap_model(self.trainer.model).state_dict()
        ema = self.trainer.ema.ema.state_dict()
        plain = {name: value for name, value in live.items() if not name.startswith("kd.")}
        return {**plain, **{f"ema.{name}": value for name, value in ema.items()}}

    @property
    def adapters(self) -> dict[str, Tensor]:
        """Every tensor of the distiller, those of a critic's optimizer too."""
        return distiller_tensors(self.trainer)


def distiller_tensors(trainer: DistillTrainer) -> dict[str, Tensor]:
    """Return a copy of every value of the distiller's state, as the sidecar file holds it."""
    return flat(unwrap_model(trainer.model).kd.state_dict())


def flat(state: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return copies of the values of a state dict in which some entries are dicts themselves."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = torch.as_tensor(value).clone()
    return found


def gradients(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's kd_gradients.csv."""
    with (folder / "kd_gradients.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def train_student(
    cache: Path | None,
    project: Path,
    *losses: str,
    student: str = "yolov8n.yaml",
    data: Path | None = None,
    balance: float | None = None,
    views: int | None = None,
    before_batch: Callable[[DistillTrainer, dict[str, Any]], None] = lambda trainer, batch: None,
    **settings: Any,
) -> Run:
    """Train through the public way; `before_batch` may look at the trainer or disturb it before each forward pass."""
    runs: list[Run] = []

    class Watched(DistillTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            runs.append(Run(Path(self.save_dir), self))

        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            runs[-1].shown.append((self.epoch, batch["kd_view"]))
            batch = super().preprocess_batch(batch)
            before_batch(self, batch)
            return batch

    every = {"project": str(project), **({} if "resume" in settings else FAST), **settings}
    threads = torch.get_num_threads()
    with mock.patch.object(training, "DistillTrainer", Watched):
        try:
            training.train(
                TrainSettings(
                    student=student, cache=cache, data=data, losses=losses, balance=balance, views=views, settings=every
                )
            )
        finally:
            torch.set_num_threads(threads)
    return runs[-1]


class Interrupt(KeyboardInterrupt):
    """What a test ends a run with."""


ENDED = r"^(\ngo on after the last whole epoch: .*)?$"
"""What the interrupt says when it has passed through the trainer."""


def interrupt_at(epoch: int, batch: int) -> Callable[[DistillTrainer, dict[str, Any]], None]:
    """Return what ends a run before the given batch of an epoch, both from 0."""
    seen: list[int] = []

    def act(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        seen.append(trainer.epoch)
        if trainer.epoch == epoch and seen.count(epoch) > batch:
            raise Interrupt

    return act


def resume(folder: Path, *losses: str, **settings: Any) -> Run:
    """Resume the run in `folder`, writing into the same."""
    last = folder / "weights" / "last.pt"
    project = folder.parent
    return train_student(None, project, *losses, student="", resume=str(last), save_dir=str(folder), **settings)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not equal to the bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def results(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's results.csv."""
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return [{key.strip(): value.strip() for key, value in row.items()} for row in csv.DictReader(file)]
