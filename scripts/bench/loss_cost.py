"""In: a teacher and its data set. Out: what each loss costs: seconds of a step, memory for its gradient, bytes to read.

Every loss is a trainer of its own beside a plain one (Ultralytics' stock trainer and loader); each round takes one
whole step of every arm, in an order that rotates. Memory is what autograd keeps of the forward pass until the backward
pass, counted by storage, over that of the plain step. Bytes are those of a view on disk that each need makes a run
read.

python scripts/bench/loss_cost.py --teacher best.pt --data bccd.yaml --publish

`--publish` writes the figures where `cache-kd losses` and the docs show them.
"""

from __future__ import annotations

import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import click
import record
import torch
from steps import in_turn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG

from cache_kd.losses import LOSSES, parse_loss
from cache_kd.losses.catalogue import MEASURED
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.inspection import describe
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import distill_plan
from cache_kd.ultralytics_bridge.settings import fixed_overrides
from cache_kd.ultralytics_bridge.trainer import DistillTrainer
from cache_kd.views.recipe import Recipe


def kept_bytes(trainer: Any) -> int:
    """Return the bytes of the storages that one forward pass keeps for the backward pass."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = trainer.preprocess_batch(next(iter(trainer.train_loader)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = trainer.model(batch)
    del loss
    return sum(storages.values())


def bytes_of_needs(cache: Cache) -> dict[str, float]:
    """Return {need: bytes of a view on disk}, headers and indices shared out by size."""
    facts = describe(cache.path)
    items = facts["images"] * len(facts["views"])
    found = {}
    for need in ("features", "score_map", "logits", "hold_stats"):
        columns = [name for column in cache.codec.columns_for([need]) for name in (column, f"{column}_length")]
        found[need] = sum(facts["bytes_by_column"].get(column, 0) for column in columns) / items
    return found


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--student", default="yolov8n.yaml")
@click.option("--imgsz", type=int, help="Default: the teacher's.")
@click.option("--batch", default=16)
@click.option("--rounds", default=9)
@click.option("--warmup", default=2)
@click.option("--publish", is_flag=True, help="Write the figures that cache-kd losses shows.")
def main(
    teacher: Path, data: Path, student: str, imgsz: int | None, batch: int, rounds: int, warmup: int, publish: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = extract(ExtractSettings(teacher, data, Path(folder) / "cache", views=2, plain_views=0, imgsz=imgsz))
        cache = Cache(made.path, data=data)
        size = cache.manifest.imgsz
        overrides: dict[str, Any] = {
            **fixed_overrides(Recipe.from_settings(cache.manifest.recipe), size),
            "model": student, "data": str(data.resolve()), "batch": batch, "nbs": batch, "workers": 0, "epochs": 100,
            "cache": "ram", "plots": False, "val": False, "amp": False, "close_mosaic": 0, "warmup_epochs": 0,
            "optimizer": "AdamW", "lr0": 1e-4, "project": folder,
        }  # fmt: skip
        settings = TrainSettings(student, cache=made.path, data=data)
        trainers: dict[str, Any] = {"plain": DetectionTrainer(DEFAULT_CFG, {**overrides, "name": "plain"})}
        for name in LOSSES:
            plan = distill_plan(cache, (parse_loss(name),), settings)
            trainers[name] = DistillTrainer(plan, {**overrides, "name": name})
        seconds = in_turn(trainers, warmup=warmup, rounds=rounds)
        kept = {arm: kept_bytes(trainer) for arm, trainer in trainers.items()}
        needs = bytes_of_needs(cache)
        channels = [str(tap.channels) for tap in cache.manifest.head.taps]
    ratios = {
        arm: record.spread([a / b for a, b in zip(taken, seconds["plain"], strict=True)])
        for arm, taken in seconds.items()
    }
    figures = {
        "plain_seconds": record.spread(seconds["plain"]),
        "plain_kept_bytes": kept["plain"],
        "losses": {
            name: {"step_over_plain": ratios[name], "kept_over_plain": kept[name] / kept["plain"]} for name in LOSSES
        },
        "bytes_a_view": needs,
    }
    setting: dict[str, Any] = {
        "teacher": teacher.name, "data": data.name, "student": student, "imgsz": size, "batch": batch,
    }  # fmt: skip
    file = record.write("loss-cost", {**setting, "rounds": rounds, "workers": 0, "cache": "ram"}, figures)
    if publish:
        device = "one GPU" if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
        setting["teacher"] = f"{teacher.name} (P3 to P5 of {', '.join(channels)} channels)"
        shown = {"date": date.today().isoformat(), "machine": device, **setting, **figures}
        MEASURED.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    for name, found in figures["losses"].items():  # type: ignore[attr-defined]  # built above
        step = found["step_over_plain"]
        click.echo(
            f"{name:8} {step['median']:.3f} of a plain step [{step['min']:.3f}, {step['max']:.3f}], "
            f"{found['kept_over_plain']:.2f} of its memory"
        )
    click.echo(", ".join(f"{need} {size / 1e3:.1f} kB" for need, size in needs.items()))
    click.echo(str(file))


if __name__ == "__main__":
    main()
