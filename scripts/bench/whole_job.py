"""In: a teacher and its data set. Out: the wall time of several distilled students, teacher once against teacher live.

`cached` is one extraction and then a training of each student from the cache; `online` is a training of each student
with Ultralytics' own `distill_model=`. Both distil with the same loss (SL2), epochs, batch and image size, and validate
alike, on the torch threads that Ultralytics chooses. The trainings alternate, so that both arms see the same machine.
Beside the ratio stands the break-even that `cache-kd estimate` predicted before anything was extracted.

python scripts/bench/whole_job.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import record
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG

from cache_kd.pipeline.estimate import estimate
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import train
from cache_kd.ultralytics_bridge.settings import fixed_overrides
from cache_kd.views.recipe import Recipe


def seconds_of(job: Callable[[], Any]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--student", default="yolov8n.yaml")
@click.option("--students", default=3)
@click.option("--imgsz", default=160)
@click.option("--epochs", default=6)
@click.option("--batch", default=16)
@click.option("--views", default=8)
@click.option("--pack", default="none")
@click.option("--name", default="whole-job")
def main(
    teacher: Path,
    data: Path,
    student: str,
    students: int,
    imgsz: int,
    epochs: int,
    batch: int,
    views: int,
    pack: str,
    name: str,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = ExtractSettings(
            teacher, data, Path(folder) / "cache", views=views, plain_views=1, imgsz=imgsz, batch=batch, pack=pack
        )
        predicted = estimate(settings, say=click.echo).chosen.figures
        extraction = seconds_of(lambda: extract(settings))
        cache = Cache(Path(folder) / "cache", data=data)
        common: dict[str, Any] = {
            "epochs": epochs, "batch": batch, "plots": False, "amp": False, "cache": "ram", "close_mosaic": 1,
            "project": folder, "workers": 0,
        }  # fmt: skip
        stock = {
            **fixed_overrides(Recipe.from_settings(cache.manifest.recipe), imgsz),
            **common, "model": student, "data": str(data.resolve()), "distill_model": str(teacher.resolve()),
        }  # fmt: skip
        taken: dict[str, list[float]] = {"cached": [], "online": []}
        for seed in range(students):
            arms: dict[str, Callable[[], Any]] = {
                "cached": lambda seed=seed: train(
                    TrainSettings(
                        student, cache=cache.path, data=data, losses=("sl2",), name=f"cached-{seed}",
                        settings={**common, "seed": seed},
                    )
                ),
                "online": lambda seed=seed: DetectionTrainer(
                    DEFAULT_CFG, {**stock, "seed": seed, "name": f"online-{seed}"}
                ).train(),
            }  # fmt: skip
            for arm in list(arms) if seed % 2 else list(arms)[::-1]:
                taken[arm].append(seconds_of(arms[arm]))
                click.echo(f"{arm} seed {seed}: {taken[arm][-1]:.1f} s")
    cached, online = sum(taken["cached"]), sum(taken["online"])
    saved = (online - cached) / (students * epochs)
    figures = {
        "extraction_seconds": extraction,
        "predicted_extraction_seconds": predicted.seconds,
        "training_seconds": {arm: record.spread(times) for arm, times in taken.items()},
        "ratio": (extraction + cached) / online,
        "ratio_of_trainings": cached / online,
        "break_even_epochs": {"measured": extraction / saved, "predicted": predicted.break_even},
    }
    click.echo(
        f"extraction {extraction:.0f} s, {students} students cached {cached:.0f} s, online {online:.0f} s: "
        f"{figures['ratio']:.3f} of online; break-even after {extraction / saved:.1f} epochs, "
        f"predicted {predicted.break_even}"
    )
    arms_of = {"teacher": teacher.name, "data": data.name, "student": student, "students": students, "imgsz": imgsz,
               "epochs": epochs, "batch": batch, "views": views, "pack": pack}  # fmt: skip
    click.echo(str(record.write(name, arms_of, figures)))


if __name__ == "__main__":
    main()
