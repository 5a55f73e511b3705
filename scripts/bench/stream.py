"""In: a teacher and its data set. Out: where the time of a training batch goes before the student sees it, by stage.

Nothing is trained: batches of `ld + bckd` are loaded, moved to the device and dequantised as `DistillTrainer` does,
from a replayed cache and from a packed one, without workers and with two. Stages, in ms a batch, each without those
inside it: `view`, images augmented or JPEG decoded; `proof`, pixels hashed and compared; `read`, targets read, checked
and inflated; `join`, rows made a batch; `send`, a worker's part of the crossing, and `receive`, the trainer's; `move`,
Ultralytics' own preparation; `dequantise`; `rest`, all else. A worker's stages run beside the trainer's: `wall` is what
the trainer would wait for batches if it did nothing else. `pickled` are the bytes of a batch that go through the pipe,
`processor` all CPU time of a batch (of the trainer only, where there are workers).

To compare two versions, give the root of each: every repeat runs all in turn, in processes of their own.

python scripts/bench/stream.py --teacher best.pt --data bccd.yaml
python scripts/bench/stream.py --teacher best.pt --data bccd.yaml --version before=/tmp/clone --version after=.
"""

from __future__ import annotations

import json
import multiprocessing.queues
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import click
import record
from ultralytics.models.yolo.detect import DetectionTrainer

from cache_kd.cache.reader import CacheReader
from cache_kd.losses import parse_losses
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import distill_plan
from cache_kd.ultralytics_bridge import training_data
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.settings import fixed_overrides
from cache_kd.ultralytics_bridge.trainer import DistillTrainer
from cache_kd.views.packing import JpegPixels
from cache_kd.views.recipe import Recipe

STAGES = ("view", "proof", "read", "join", "send", "receive", "move", "dequantise", "rest")
CLOCK = "kd_clock"
WARMUP = 6
"""Batches that are not counted: pixels of each process's first 48 items are compared, of later ones one in 64."""


class Clock:
    """Seconds by stage, those of inner stages taken off the outer ones."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.pickled = 0
        self._inner = [0.0]

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time added to `stage`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self.seconds[stage] += took - self._inner.pop()
                self._inner[-1] += took

        return call

    def patch(self, holder: Any, name: str, stage: str) -> None:
        """Time a function where it stands."""
        setattr(holder, name, self.timed(stage, getattr(holder, name)))

    def taken(self) -> dict[str, float]:
        """Return what was counted since the last call."""
        found = {**self.seconds, "pickled": float(self.pickled)}
        self.seconds, self.pickled = dict.fromkeys(STAGES, 0.0), 0
        return found


def install(clock: Clock) -> None:
    """Time every stage in this process and in the workers that it forks."""
    for holder, name, stage in (
        (ViewDataset, "item", "view"),
        (JpegPixels, "decode", "view"),
        (CacheReader, "read_row", "read"),
        (training_data, "pixel_hash", "proof"),
        (DetectionTrainer, "preprocess_batch", "move"),
    ):
        clock.patch(holder, name, stage)
    collate = clock.timed("join", training_data.Collate.__call__)

    def joined(self: Any, items: Any) -> dict[str, Any]:
        return {**collate(self, items), CLOCK: clock.taken()}

    training_data.Collate.__call__ = joined  # type: ignore[method-assign]  # this is what is measured

    class Pickler(ForkingPickler):
        """A queue's pickler; the sending thread has no stages inside, so that it only adds."""

        @classmethod
        def dumps(cls, obj: Any, protocol: Any = None) -> Any:
            started = time.perf_counter()
            found = ForkingPickler.dumps(obj, protocol)
            if isinstance(obj, tuple) and isinstance(obj[-1], dict):
                clock.seconds["send"] += time.perf_counter() - started
                clock.pickled += len(found)
            return found

        loads = staticmethod(clock.timed("receive", ForkingPickler.loads))

    multiprocessing.queues._ForkingPickler = Pickler  # type: ignore[attr-defined]  # undocumented


def measure(path: Path, data: Path, folder: Path, *, workers: int, batch: int, batches: int) -> dict[str, float]:
    """Return the mean of every figure a batch, milliseconds and bytes."""
    cache = Cache(path, data=data)
    plan = distill_plan(cache, parse_losses(["ld", "bckd"]), TrainSettings("yolov8n.yaml", cache=path, data=data))
    settings: dict[str, Any] = {
        **fixed_overrides(Recipe.from_settings(cache.manifest.recipe), cache.manifest.imgsz),
        "model": "yolov8n.yaml", "data": str(data.resolve()), "batch": batch, "workers": workers, "epochs": 100,
        "cache": "ram", "plots": False, "val": False, "amp": False, "close_mosaic": 0, "project": str(folder),
    }  # fmt: skip
    clock = Clock()
    install(clock)
    object.__setattr__(plan, "decode", clock.timed("dequantise", plan.decode))
    trainer = DistillTrainer(plan, settings)
    trainer._setup_train()
    sums: dict[str, float] = dict.fromkeys((*STAGES, "pickled", "wall", "processor"), 0.0)
    counted, epoch = 0, 0
    while counted < batches:
        trainer.epoch = epoch
        trainer._model_train()
        at, used = time.perf_counter(), time.process_time()
        for number, loaded in enumerate(trainer.train_loader):
            worker = loaded.pop(CLOCK)
            trainer.preprocess_batch(loaded)
            del loaded
            now, now_used = time.perf_counter(), time.process_time()
            if len(trainer.train_loader) * epoch + number >= WARMUP and counted < batches:
                own = clock.taken()
                for name, value in own.items():
                    sums[name] += value + worker[name]
                sums["wall"] += now - at
                sums["processor"] += now_used - used
                if not workers:
                    sums["rest"] += now - at - sum(worker[key] + own[key] for key in STAGES)
                counted += 1
            else:
                clock.taken()
            at, used = now, now_used
        epoch += 1
    trainer.train_loader.close()
    return {name: value / counted * (1 if name == "pickled" else 1e3) for name, value in sums.items()}


def in_process(root: Path, arguments: Mapping[str, Any]) -> dict[str, float]:
    """Run `measure` with the package in `root`, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(dict(arguments))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root.resolve()), str(Path(__file__).parent)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--imgsz", default=320)
@click.option("--batch", default=16)
@click.option("--batches", default=24)
@click.option("--repeats", default=3)
@click.option("--pack", default="jpeg:95")
@click.option("--version", "versions", multiple=True, default=("this=.",), help="NAME=ROOT of the package to measure.")
@click.option("--replay-cache", type=click.Path(path_type=Path), help="A cache made before, instead of extracting.")
@click.option("--packed-cache", type=click.Path(path_type=Path), help="The same, packed.")
@click.option("--name", default="stream")
@click.option("--one", hidden=True)
def main(
    teacher: Path | None,
    data: Path | None,
    imgsz: int,
    batch: int,
    batches: int,
    repeats: int,
    pack: str,
    versions: tuple[str, ...],
    replay_cache: Path | None,
    packed_cache: Path | None,
    name: str,
    one: str | None,
) -> None:
    if one is not None:
        told = json.loads(one)
        paths = [Path(told.pop(key)) for key in ("path", "data", "folder")]
        click.echo(json.dumps(measure(*paths, **told)))
        return
    if teacher is None or data is None:
        raise click.UsageError("--teacher and --data are needed")
    roots = dict(version.split("=", 1) for version in versions)
    with tempfile.TemporaryDirectory() as folder:
        caches = {"replay": replay_cache, "packed": packed_cache}
        for kind, packing in (("replay", "none"), ("packed", pack)):
            if caches[kind] is None:
                where = Path(folder) / kind
                caches[kind] = extract(
                    ExtractSettings(teacher, data, where, views=2, plain_views=0, imgsz=imgsz, pack=packing)
                ).path
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(repeats):
            for kind, path in caches.items():
                for workers in (0, 2):
                    for version, root in roots.items():
                        arguments = {"path": str(path), "data": str(data), "folder": folder, "workers": workers,
                                     "batch": batch, "batches": batches}  # fmt: skip
                        figures = in_process(Path(root), arguments)
                        arm = f"{version}, {kind}, {workers} workers"
                        found.setdefault(arm, []).append(figures)
                        click.echo(f"{arm}: wall {figures['wall']:.1f} ms a batch", err=True)
    table = {arm: {key: record.spread([run[key] for run in runs]) for key in runs[0]} for arm, runs in found.items()}
    settings = {"teacher": teacher.name, "data": data.name, "imgsz": imgsz, "batch": batch, "batches": batches,
                "repeats": repeats, "pack": pack, "losses": ["ld", "bckd"], "unit": "ms a batch"}  # fmt: skip
    file = record.write(name, settings, table)
    for arm, row in table.items():
        click.echo(f"{arm}: " + ", ".join(f"{key} {value['median']:.1f}" for key, value in row.items()))
    click.echo(str(file))


if __name__ == "__main__":
    main()
