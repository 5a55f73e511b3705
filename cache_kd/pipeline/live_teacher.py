"""In: a cache and a checkpoint. Out: the cache's own teacher, ready to say its targets again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cache_kd.errors import MismatchError
from cache_kd.pipeline.identity import teacher_differences
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.ultralytics_bridge.teacher import Teacher, load_teacher


@contextmanager
def live_teacher(cache: Cache, path: Path, *, trusted: bool) -> Iterator[Teacher]:
    """Have the teacher of a cache at hand inside this scope, on the extraction's kind of device, with its threads.

    Raises:
        MismatchError: The checkpoint is another teacher. CacheKDError: It cannot be loaded.
    """
    manifest, environment = cache.manifest, cache.manifest.environment
    checkpoint = load_teacher(path, trusted=trusted)
    if unlike := teacher_differences(manifest.identity.get("teacher"), checkpoint):
        raise MismatchError(
            f"{path} is not the teacher of {cache.path} ({unlike}); give the one that it was extracted with: "
            f"--teacher {manifest.teacher['file']}"
        )
    device = "cuda:0" if environment["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(cpu_threads())
    try:
        yield Teacher(
            checkpoint,
            imgsz=manifest.imgsz,
            device=device,
            precision=environment["precision"] if device != "cpu" else "fp32",
            store=tuple(manifest.codec["store"]),
            taps=tuple(tap.name for tap in manifest.head.layers),
        )
    finally:
        torch.set_num_threads(threads)
