"""In: Ultralytics settings. Out: a run of the stock trainer, untouched: a teacher, or an arm to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG

from cache_kd.errors import CacheKDError
from cache_kd.ultralytics_bridge.gate import readable, safe_loading
from cache_kd.ultralytics_bridge.run_files import keep_epochs


@dataclass(frozen=True)
class Baseline:
    """What a stock run leaves: its folder, the metrics of its best checkpoint, images shown, those again counted."""

    folder: Path
    metrics: dict[str, float]
    images_shown: int


def train_stock(settings: Mapping[str, Any], *, threads: int | None = None) -> Baseline:
    """Train with Ultralytics' own trainer.

    Args:
        settings: Ultralytics settings with model, data and an absolute project; with `distill_model` it distils from
            that teacher in its own way; with `resume` it goes on from that checkpoint.
        threads: torch threads; None leaves Ultralytics' choice.
    """
    trainer = DetectionTrainer(DEFAULT_CFG, dict(settings))
    return run_trainer(trainer, threads=threads)


def run_trainer(trainer: DetectionTrainer, *, threads: int | None) -> Baseline:
    """Run a trainer to its end."""
    if threads:
        torch.set_num_threads(threads)
    trainer.train()
    metrics = {str(key): float(value) for key, value in (trainer.metrics or {}).items()}
    shown = len(trainer.train_loader.dataset) * (trainer.epoch + 1)
    return Baseline(Path(trainer.save_dir), metrics, shown)


def epoch_to_resume(last: Path, epochs: int) -> int | None:
    """Return the epoch, from 0, at which a run of `epochs` goes on from its `last.pt`; `epochs` if it is finished.

    None: the file is missing, torn or no checkpoint of a training, so the run has to begin again.
    """
    if not last.is_file():
        return None
    try:
        with safe_loading(), readable("checkpoint", last, "--trust-student"):
            _, content = load_checkpoint(str(last), device="cpu")
    except CacheKDError:
        return None
    epoch = content.get("epoch")
    if type(epoch) is not int:
        return None
    return epochs if epoch < 0 or epoch + 1 >= epochs else epoch + 1


def drop_later_epochs(folder: Path, epoch: int) -> None:
    """Drop the rows of epochs that the stock trainer will do again when it goes on at `epoch`, from 0."""
    keep_epochs(folder / "results.csv", epoch)
