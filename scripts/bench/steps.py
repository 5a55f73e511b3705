"""In: trainers of several arms. Out: seconds of single training steps, taken in turn: all see the same machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.pipeline.versions import cpu_threads


def steps(trainer: Any) -> Iterator[float]:
    """Yield the seconds of one training step after another, as the trainer's own loop does them."""
    trainer._setup_train()
    torch.set_num_threads(cpu_threads())
    epoch = 0
    while True:
        trainer.epoch = epoch
        trainer._model_train()
        if hasattr(unwrap_model(trainer.model), "kd_measure"):
            unwrap_model(trainer.model).kd_measure = False  # once an epoch, not part of a step
        started = time.perf_counter()
        for batch in trainer.train_loader:
            loss, _ = trainer.model(trainer.preprocess_batch(batch))
            trainer.loss = loss.sum()
            trainer.loss.backward()
            trainer.optimizer_step()
            yield time.perf_counter() - started
            started = time.perf_counter()
        epoch += 1


def in_turn(trainers: Mapping[str, Any], *, warmup: int, rounds: int) -> dict[str, list[float]]:
    """Return {arm: seconds of `rounds` steps}; a round takes one step of every arm, in an order that rotates."""
    arms = {arm: steps(trainer) for arm, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    names = list(arms)
    for turn in range(warmup + rounds):
        for arm in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = next(arms[arm])
            if turn >= warmup:
                seconds[arm].append(taken)
    return seconds
