"""In: Ultralytics settings. Out: a run of the stock trainer, untouched: a teacher, or an arm to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG


def train_stock(settings: Mapping[str, Any], *, threads: int | None = None) -> tuple[Path, dict[str, float]]:
    """Train with Ultralytics' own trainer and return the run's folder and the metrics of its best checkpoint.

    Args:
        settings: Ultralytics settings with model, data and an absolute project.
        threads: torch threads; None leaves Ultralytics' choice.
    """
    trainer = DetectionTrainer(DEFAULT_CFG, dict(settings))
    if threads:
        torch.set_num_threads(threads)
    trainer.train()
    return Path(trainer.save_dir), {str(key): float(value) for key, value in (trainer.metrics or {}).items()}
