"""In: a plan and Ultralytics' settings. Out: the training set and the loader that streams it with its targets."""

from __future__ import annotations

import logging
import os
from typing import Any

from ultralytics.data.build import seed_worker

from cache_kd.student.loader import ViewLoader, ViewSampler
from cache_kd.student.prefetch import Prefetch, choose_prefetch, free_shared_memory
from cache_kd.ultralytics_bridge.dataset import DECODED_BYTES
from cache_kd.ultralytics_bridge.plan import DistillPlan
from cache_kd.ultralytics_bridge.training_data import PackedTrainingDataset, TrainingDataset

LOG = logging.getLogger(__name__)
TrainingSet = TrainingDataset | PackedTrainingDataset


def training_set(
    plan: DistillPlan, data: dict[str, Any], *, cache: object, stride: int, proven: bool = False
) -> TrainingSet:
    """Return the views of a run: those that the cache keeps, else made of the images, checked to be the teacher's.

    Args:
        data: Ultralytics' description of the data set. cache: its setting `cache=`. stride: the student's largest.
        proven: another process of the run checks that the images are the teacher's.
    """
    if plan.packed is not None:
        return PackedTrainingDataset(plan.packed, targets=plan.targets)
    images = TrainingDataset(
        data,
        targets=plan.targets,
        recipe=plan.recipe,
        imgsz=plan.imgsz,
        seed=plan.seed,
        stride=stride,
        decoded_bytes=(1 << 62) if _every_image(cache) else DECODED_BYTES,
    )
    if not proven:
        plan.check_data(images)
    return images


def training_loader(
    plan: DistillPlan, dataset: TrainingSet, sampler: ViewSampler, *, batch_size: int, workers: int,
    processes: int, cache: object, pinned: bool,
) -> ViewLoader:  # fmt: skip
    """Return the loader of a run.

    Args:
        batch_size: images of this process. workers: its loading processes, as asked for.
        processes: that train on this machine, and share its cores and memory. cache: as above.
        pinned: whether batches are moved to an accelerator.
    """
    batch_size = min(batch_size, len(sampler))
    ahead = _prefetch(plan, batch_size, workers, processes, cache)
    return ViewLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=ahead.workers,
        persistent_workers=ahead.workers > 0,
        prefetch_factor=ahead.ahead or None,
        pin_memory=pinned,
        collate_fn=dataset.collate_fn,
        worker_init_fn=seed_worker,
    )


def _prefetch(plan: DistillPlan, batch_size: int, workers: int, processes: int, cache: object) -> Prefetch:
    """Return how far the workers run ahead, and say what memory that takes."""
    free = free_shared_memory()
    item_bytes = 3 * plan.imgsz**2 + (plan.targets.row_bytes if plan.targets else 0)
    chosen = choose_prefetch(
        batch_size * item_bytes,
        min(-(-(os.cpu_count() or 1) // processes), workers),
        None if free is None else free // processes,
    )
    every_image = plan.packed is None and _every_image(cache)
    decoded = 0 if plan.packed is not None or every_image else DECODED_BYTES
    LOG.info(
        "loading takes at most %.0f MiB%s%s: %d batches of %.1f MiB, the rest kept by each process that makes them",
        chosen.total_bytes(decoded) / 2**20,
        " and all images, decoded, a process" if every_image else "",
        f" on each of {processes} devices" if processes > 1 else "",
        chosen.batches,
        chosen.batch_bytes / 2**20,
    )
    return chosen


def _every_image(cache: object) -> bool:
    return cache in (True, "ram")
