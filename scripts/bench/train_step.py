"""In: a teacher and its data set. Out: seconds of a training step plain, online and cached, step by step in turn.

Every arm is a trainer of its own with the same settings; each round takes one whole step (loading, forward, backward,
optimizer) of every arm, in an order that rotates. Arms: `plain`, Ultralytics' stock trainer and loader; `online`, the
stock `distill_model=`; `cached …`, this project; `…, no losses`, the same with the targets of ld and bckd read, moved
and dequantised but no loss computed, so that the cost of the losses stands apart; `cached packed …`, from a cache that
keeps its views as JPEG, a decoded image an item.

python scripts/bench/train_step.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import record
from steps import in_turn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG

from cache_kd.losses import parse_losses
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.inspection import describe
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import distill_plan
from cache_kd.ultralytics_bridge.settings import fixed_overrides
from cache_kd.ultralytics_bridge.student import TARGETS
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

PACK = "jpeg:95"
ARMS = {"cached sl2": ["sl2"], "cached ld+bckd": ["ld", "bckd"], "cached cwd+ld": ["cwd", "ld"]}


class ReadOnlyTrainer(DistillTrainer):
    """Reads and dequantises the targets of ld and bckd, and then trains plainly."""

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        batch.pop(TARGETS)
        return batch


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--student", default="yolov8n.yaml")
@click.option("--fidelity", default="default")
@click.option("--batch", default=16)
@click.option("--rounds", default=25)
@click.option("--warmup", default=3)
@click.option("--cache-mode", default="ram", help="Ultralytics' cache= in every arm: ram or False.")
@click.option("--name", default="train-step")
def main(
    teacher: Path,
    data: Path,
    student: str,
    fidelity: str,
    batch: int,
    rounds: int,
    warmup: int,
    cache_mode: str,
    name: str,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = extract(
            ExtractSettings(teacher, data, Path(folder) / "cache", views=2, plain_views=0, fidelity=fidelity)
        )
        packed = extract(
            ExtractSettings(
                teacher, data, Path(folder) / "packed", views=2, plain_views=0, fidelity=fidelity, pack=PACK
            )
        )
        cache = Cache(made.path, data=data)
        manifest = cache.manifest
        settings: dict[str, Any] = {
            **fixed_overrides(_recipe(cache), manifest.imgsz),
            "model": student, "data": str(data.resolve()), "batch": batch, "nbs": batch, "workers": 0, "epochs": 100,
            "cache": cache_mode if cache_mode == "ram" else False, "plots": False, "val": False, "amp": False,
            "close_mosaic": 0, "warmup_epochs": 0, "optimizer": "AdamW", "lr0": 1e-4, "project": folder,
        }  # fmt: skip
        trainers: dict[str, Any] = {"plain": DetectionTrainer(DEFAULT_CFG, {**settings, "name": "plain"})}
        trainers["online"] = DetectionTrainer(
            DEFAULT_CFG, {**settings, "name": "online", "distill_model": str(teacher.resolve())}
        )
        plain = TrainSettings(student, cache=made.path, data=data)
        for arm, specs in ARMS.items():
            trainers[arm] = DistillTrainer(distill_plan(cache, parse_losses(specs), plain), {**settings, "name": arm})
        with_views = Cache(packed.path, data=data)
        trainers["cached packed ld+bckd"] = DistillTrainer(
            distill_plan(with_views, parse_losses(["ld", "bckd"]), replace(plain, cache=packed.path)),
            {**settings, "name": "packed"},
        )
        for arm, held, of in (
            ("cached, no losses", cache, made.path),
            ("cached packed, no losses", with_views, packed.path),
        ):
            every = distill_plan(held, parse_losses(["ld", "bckd"]), replace(plain, cache=of))
            trainers[arm] = ReadOnlyTrainer(every, {**settings, "name": arm.replace(" ", "-")})
        seconds = in_turn(trainers, warmup=warmup, rounds=rounds)
        names = list(trainers)
        ratios = {
            arm: record.spread([a / b for a, b in zip(seconds[arm], seconds["plain"], strict=True)]) for arm in names
        }
        figures = {arm: {"seconds": record.spread(seconds[arm]), "over_plain": ratios[arm]} for arm in names}
        file = record.write(
            name,
            {"teacher": teacher.name, "data": data.name, "student": student, "imgsz": manifest.imgsz, "batch": batch,
             "fidelity": fidelity, "rounds": rounds, "cache_mode": cache_mode, "workers": 0, "pack": PACK,
             "pixel_bytes_per_view": _pixel_bytes(packed.path)},
            figures,
        )  # fmt: skip
    for arm in names:
        took, ratio = figures[arm]["seconds"], figures[arm]["over_plain"]
        click.echo(
            f"{arm:25} {took['median']:.3f} s [{took['min']:.3f}, {took['max']:.3f}]  "
            f"{ratio['median']:.3f} of plain [{ratio['min']:.3f}, {ratio['max']:.3f}]  "
            f"medians' ratio {took['median'] / figures['plain']['seconds']['median']:.3f}"
        )
    click.echo(str(file))


def _pixel_bytes(path: Path) -> float:
    """Return the bytes on disk of a packed view's pixels."""
    facts = describe(path)
    return facts["bytes_by_column"]["pixels"] / (facts["images"] * len(facts["views"]))


def _recipe(cache: Cache) -> Any:
    from cache_kd.views.recipe import Recipe

    return Recipe.from_settings(cache.manifest.recipe)


if __name__ == "__main__":
    main()
