"""In: an opened cache. Out: batches as the trainer prepares them, and students that learn from them by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from cache_kd.losses import parse_losses
from cache_kd.pipeline.opened import Cache
from cache_kd.structures import View
from cache_kd.student.batch import stack_columns, target_columns
from cache_kd.student.distiller import Distiller
from cache_kd.ultralytics_bridge.heads import describe_head
from cache_kd.ultralytics_bridge.student import TARGETS, attach_distiller

MIXED = View("mixed", 0)


def prepared(cache: Cache, *losses: str, view: View = MIXED, indices: tuple[int, ...] = (0, 1, 2, 3)) -> dict[str, Any]:
    """Return a training batch: float images, labels, and what `losses` need as decoded targets."""
    batch: dict[str, Any] = cache.dataset.collate_fn([cache.dataset.item(view, index) for index in indices])
    batch["img"] = batch["img"].float() / 255
    names = cache.codec.columns_for(frozenset[str]().union(*(spec.needs for spec in parse_losses(losses))))
    ragged = frozenset(column.name for column in cache.codec.columns if column.ragged)
    rows = [cache.reader.read(view, index, names) for index in indices]
    return {**batch, TARGETS: cache.codec.decode(target_columns(stack_columns(rows, ragged), names))}


def distilled(student: nn.Module, cache: Cache, *losses: str) -> nn.Module:
    """Return a copy of a student in train mode with these losses attached as the trainer does it."""
    student = copy.deepcopy(student).train()
    specs = parse_losses(losses)
    levels = {tap.name for tap in cache.manifest.head.taps}
    layers = dict.fromkeys(name for spec in specs for name in spec.student_layers if name not in levels)
    head = describe_head(student, "student", layers=tuple(layers))
    frozen = cache.frozen_head() if any("head" in spec.reads for spec in specs) else None
    return attach_distiller(student, Distiller(specs, cache.manifest.head, head, seed=0, head=frozen))


def seen_outputs(model: nn.Module, *paths: str) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Hook layers by their path below `model.model`; return where their next outputs appear, and the hooks."""
    found: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            found[path] = output

        return hook

    sequence: Any = model.model
    return found, [sequence.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
