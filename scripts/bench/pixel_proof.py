"""In: a teacher and its data set. Out: the share of a training step that comparing pixels with the teacher's takes.

One trainer for each value of --verify-pixels, everything else equal; each round takes one whole step (loading, forward,
backward, optimizer) of every arm, in an order that rotates. The time inside the comparison (reading the stored hash,
hashing the pixels) is taken apart, since a hundredth of a step is less than steps differ by. The 48 items that `first`
always compares lie in the warm-up: the rounds show what it costs for the rest of a run.

python scripts/bench/pixel_proof.py --teacher best.pt --data bccd.yaml --imgsz 320 --fraction 0.2
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import record
from steps import in_turn

from cache_kd.losses import parse_losses
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import PROOFS, TrainSettings
from cache_kd.pipeline.training import distill_plan
from cache_kd.ultralytics_bridge.settings import fixed_overrides
from cache_kd.ultralytics_bridge.trainer import DistillTrainer
from cache_kd.ultralytics_bridge.training_data import FIRST_ITEMS, SAMPLED, TrainingDataset
from cache_kd.views.recipe import Recipe


class Clock:
    """Seconds and number of the comparisons of each arm."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        stock = TrainingDataset._fault

        def timed(dataset: TrainingDataset, targets: Any, *rest: Any) -> str | None:
            started = time.perf_counter()
            found = stock(dataset, targets, *rest)
            self.seconds[targets.verify].append(time.perf_counter() - started)
            return found

        TrainingDataset._fault = timed  # type: ignore[method-assign]  # the measured function


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--student", default="yolov8n.yaml")
@click.option("--imgsz", default=320)
@click.option("--fraction", default=1.0, help="Share of the training images.")
@click.option("--batch", default=16)
@click.option("--rounds", default=12)
@click.option("--name", default="pixel-proof")
def main(
    teacher: Path, data: Path, student: str, imgsz: int, fraction: float, batch: int, rounds: int, name: str
) -> None:
    warmup = -(-FIRST_ITEMS // batch)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        made = extract(
            ExtractSettings(
                teacher, data, Path(folder) / "cache", views=1, plain_views=0, imgsz=imgsz,
                augment={"fraction": fraction},
            )
        )  # fmt: skip
        cache = Cache(made.path, data=data)
        settings: dict[str, Any] = {
            **fixed_overrides(Recipe.from_settings(cache.manifest.recipe), imgsz),
            "model": student, "data": str(data.resolve()), "batch": batch, "nbs": batch, "workers": 0, "epochs": 100,
            "plots": False, "val": False, "amp": False, "close_mosaic": 0, "warmup_epochs": 0, "project": folder,
        }  # fmt: skip
        trainers = {
            proof: DistillTrainer(
                distill_plan(
                    cache,
                    parse_losses(["cwd", "ld"]),
                    TrainSettings(student, cache=made.path, data=data, verify_pixels=proof),
                ),
                {**settings, "name": proof},
            )
            for proof in ("off", *(proof for proof in PROOFS if proof != "off"))
        }
        seconds = in_turn(trainers, warmup=warmup, rounds=rounds)
        images = len(cache.images)
    figures = {proof: _figures(seconds, clock.seconds, batch, proof) for proof in trainers}
    file = record.write(
        name,
        {"teacher": teacher.name, "data": data.name, "images": images, "student": student, "imgsz": imgsz,
         "batch": batch, "rounds": rounds, "losses": "cwd, ld", "workers": 0, "first_items": FIRST_ITEMS,
         "sampled_one_in": SAMPLED},
        figures,
    )  # fmt: skip
    for proof, found in figures.items():
        click.echo(
            f"{proof:6} step {found['step_seconds']['median']:.3f} s, {found['over_off']['median']:.3f} of off "
            f"[{found['over_off']['min']:.3f}, {found['over_off']['max']:.3f}]; comparing {100 * found['share']:.3f} % "
            f"of a step, {found['milliseconds_each']:.2f} ms each"
        )
    click.echo(str(file))


def _figures(steps: dict[str, list[float]], checks: dict[str, list[float]], batch: int, proof: str) -> dict[str, Any]:
    """Return an arm's figures; `share` is that of a step in the long run, when one item in `SAMPLED` or all are due."""
    each = statistics.fmean(checks[proof]) if checks[proof] else 0.0
    items = {"off": 0.0, "first": batch / SAMPLED, "all": float(batch)}[proof]
    ratios = [arm / off for arm, off in zip(steps[proof], steps["off"], strict=True)]
    return {
        "step_seconds": record.spread(steps[proof]),
        "over_off": record.spread(ratios),
        "checks": len(checks[proof]),
        "milliseconds_each": each * 1e3,
        "share": each * items / statistics.fmean(steps[proof]),
    }


if __name__ == "__main__":
    main()
