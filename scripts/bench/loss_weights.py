"""In: a teacher's cache. Out: how strong each loss is on a student's neck against the detection loss, over a training.

One student is trained plainly on the views of the cache. Every method's adapters learn beside it on maps without
gradient, so that no method changes the student that the others are measured on. Every few steps the gradient of each
raw term on the neck's outputs is measured against that of the detection loss: the ratio at weight 1. The weight that
makes the ratio `--ratio` (0.4: a share of 0.29) is printed for the early, the middle and the late third of the run.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import click
import record
import torch
from torch import Tensor, nn
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.losses import LOSSES, parse_losses
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import distill_plan
from cache_kd.structures import DetectorOutput, TargetBatch
from cache_kd.student.alarms import gradient_shares
from cache_kd.student.distiller import Distiller
from cache_kd.ultralytics_bridge.settings import fixed_overrides
from cache_kd.ultralytics_bridge.trainer import DistillTrainer
from cache_kd.views.recipe import Recipe

STAGES = ("early", "middle", "late")


class Watching(DistillTrainer):
    """Trains the student plainly and the adapters beside it; keeps the ratio of every term at every measured step."""

    every: int
    ratios: list[dict[str, float]]

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model: Any = super().get_model(cfg, weights, verbose)
        self.ratios, self._steps = [], 0
        seen: list[TargetBatch] = []

        def beside(distiller: Distiller, said: DetectorOutput, targets: TargetBatch) -> dict[str, Tensor]:
            seen[:] = [targets]
            return Distiller.forward(distiller, _detached(said), targets)

        def measure(student: Any, detection: Tensor, weighted: dict[str, Tensor], said: DetectorOutput) -> None:
            self._steps += 1
            if self._steps % self.every:
                return
            images = said.scores.shape[0]
            terms = {name: term * images for name, term in Distiller.forward(student.kd, said, seen[0]).items()}
            shares = gradient_shares(detection.sum(), terms, said.features)
            self.ratios.append({name: share / (1 - share) for name, share in shares.items()})

        model.kd.forward = MethodType(beside, model.kd)
        type(model)._measure = measure
        return model

    def _watch_terms(self) -> None:
        unwrap_model(self.model).kd_seen.clear()


def _detached(said: DetectorOutput) -> DetectorOutput:
    return replace(
        said,
        features=tuple(level.detach() for level in said.features),
        scores=said.scores.detach(),
        boxes=said.boxes.detach(),
        hold=tuple(hold.detach() for hold in said.hold),
    )


def weights_by_stage(ratios: list[dict[str, float]], wanted: float) -> dict[str, dict[str, float]]:
    """Return {loss: {stage: weight}} at which the median ratio of each third of a run is `wanted`."""
    third = max(len(ratios) // 3, 1)
    parts = dict(zip(STAGES, (ratios[:third], ratios[third : 2 * third], ratios[2 * third :]), strict=True))
    return {
        name: {stage: wanted / statistics.median(row[name] for row in rows) for stage, rows in parts.items() if rows}
        for name in ratios[0]
    }


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--student", default="yolov8n.yaml")
@click.option("--imgsz", default=160)
@click.option("--epochs", default=60)
@click.option("--views", default=4)
@click.option("--batch", default=16)
@click.option("--every", default=10, help="Steps between two measurements.")
@click.option("--ratio", default=0.4, help="Gradient of a term over that of the detection loss.")
@click.option("--loss", "losses", multiple=True, help="Losses to measure; default: all.")
@click.option("--name", required=True, help="Name of the record.")
def main(
    teacher: Path,
    data: Path,
    student: str,
    imgsz: int,
    epochs: int,
    views: int,
    batch: int,
    every: int,
    ratio: float,
    losses: tuple[str, ...],
    name: str,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = extract(
            ExtractSettings(teacher, data, Path(folder) / "cache", views=views, plain_views=1, imgsz=imgsz, batch=batch)
        )
        cache = Cache(made.path, data=data)
        overrides: dict[str, Any] = {
            **fixed_overrides(Recipe.from_settings(cache.manifest.recipe), imgsz),
            "model": student, "data": str(data.resolve()), "batch": batch, "nbs": batch, "epochs": epochs,
            "cache": "ram", "plots": False, "val": False, "amp": False, "project": folder, "save": False,
        }  # fmt: skip
        specs = parse_losses(list(losses or LOSSES))
        trainer = Watching(distill_plan(cache, specs, TrainSettings(student, cache=made.path, data=data)), overrides)
        trainer.every = every
        torch.set_num_threads(2)
        trainer.train()
        found = weights_by_stage(trainer.ratios, ratio)
        settings = {
            "teacher": teacher.name, "data": data.name, "student": Path(student).name, "imgsz": imgsz, "epochs": epochs,
            "batch": batch, "every": every, "ratio": ratio, "measured": len(trainer.ratios),
        }  # fmt: skip
        file = record.write(f"loss-weights-{name}", settings, found)
    for loss, stages in found.items():
        click.echo(f"{loss:8} " + "  ".join(f"{stage} {weight:.3g}" for stage, weight in stages.items()))
    click.echo(str(file))


if __name__ == "__main__":
    main()
