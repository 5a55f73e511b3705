"""In: what a cache offers a training. Out: the same in one value, from which a trainer can be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cache_kd.losses import LossSpec
from cache_kd.structures import FrozenHead, HeadSpec, TargetBatch, View
from cache_kd.student.order import ShuffleWindow
from cache_kd.ultralytics_bridge.first_batch import TeacherBoxes
from cache_kd.ultralytics_bridge.packed import PackedViews
from cache_kd.ultralytics_bridge.training_data import TargetSource, TrainingDataset
from cache_kd.views.recipe import Recipe


@dataclass(frozen=True)
class DistillPlan:
    """What a run takes from a cache.

    Attributes:
        losses: the terms; empty for a plain run on the same views.
        views: the cache's views. recipe, imgsz, seed: what its pixels are made of.
        teacher: its teacher's head. targets: where items find their columns; None without losses.
        needs_to_columns, decode: the codec's, by which columns become targets on the device.
        head: returns the teacher's head, for losses that run it.
        check_data: called with a training set of images before the first epoch; raises when it is not the teacher's.
        packed: the views that the cache keeps itself, which replace images; None where it keeps none.
        record: what `cache_kd.yaml` in the run's folder says; a resumed run must agree with it.
        boxes: the teacher's boxes of a view, for the picture of the first batch; None where the cache has no logits.
        window: the shards within which images are shuffled; None shuffles over all.
    """

    losses: tuple[LossSpec, ...]
    views: tuple[View, ...]
    recipe: Recipe
    imgsz: int
    seed: int
    teacher: HeadSpec
    targets: TargetSource | None
    decode: Callable[[Mapping[str, torch.Tensor]], TargetBatch]
    head: Callable[[], FrozenHead]
    check_data: Callable[[TrainingDataset], None]
    packed: PackedViews | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    boxes: TeacherBoxes | None = None
    window: ShuffleWindow | None = None
