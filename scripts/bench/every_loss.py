"""In: a teacher and its data set. Out: a short training with every loss: does its term fall, does the neck feel it?

Each loss alone, at its default weight, from the same cache and the same start; then logits and features together. A run
is judged by its own records: the column of results.csv, the shares of kd_gradients.csv, the warnings.

python scripts/bench/every_loss.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import record
import torch

from cache_kd.losses import LOSSES, parse_loss
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import train

TOGETHER = ("ld", "bckd", "cwd", "sl2")


class Warnings(logging.Handler):
    """Keeps what the package warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, entry: logging.LogRecord) -> None:
        self.lines.append(entry.getMessage())


def one_run(task: tuple[str, tuple[str, ...], Path, Path, Path, dict[str, Any], int]) -> tuple[str, dict[str, Any]]:
    """Train with the losses of one arm in a process of its own and return what its files say."""
    arm, losses, cache, data, project, settings, threads = task
    warnings = Warnings()
    logging.getLogger("cache_kd").addHandler(warnings)
    done = train(
        TrainSettings(
            settings["model"], cache=cache, data=data, losses=losses or ("none",), name=arm, threads=threads,
            settings={**{key: value for key, value in settings.items() if key != "model"}, "project": str(project)},
        )
    )  # fmt: skip
    rows = _rows(done.folder / "results.csv")
    shares: dict[str, list[float]] = defaultdict(list)
    if losses:
        for row in _rows(done.folder / "kd_gradients.csv"):
            shares[row["term"]].append(float(row["share"]))
    terms = {
        name: {
            "first": float(rows[0][f"train/{name}_loss"]),
            "last": float(rows[-1][f"train/{name}_loss"]),
            "share": {"median": statistics.median(values), "min": min(values), "max": max(values)},
        }
        for name, values in shares.items()
    }
    return arm, {"terms": terms, "warnings": warnings.lines, "mAP50-95": done.metrics.get("metrics/mAP50-95(B)")}


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return [{key.strip(): value.strip() for key, value in row.items()} for row in csv.DictReader(lines)]


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--student", default="yolov8n.yaml")
@click.option("--imgsz", default=160)
@click.option("--epochs", default=10)
@click.option("--batch", default=16)
@click.option("--views", default=4)
@click.option("--jobs", default=2, help="Trainings at once.")
@click.option("--threads", default=1, help="torch threads of each.")
@click.option("--loss", "chosen", multiple=True, help="Only these, as specs; default: every loss.")
@click.option("--name", default="every-loss")
def main(
    teacher: Path,
    data: Path,
    student: str,
    imgsz: int,
    epochs: int,
    batch: int,
    views: int,
    jobs: int,
    threads: int,
    chosen: tuple[str, ...],
    name: str,
) -> None:
    arms: dict[str, tuple[str, ...]] = {parse_loss(spec).name: (spec,) for spec in chosen or LOSSES}
    if not chosen:
        arms = {"plain": (), **arms, "+".join(TOGETHER): TOGETHER}
    settings: dict[str, Any] = {
        "model": student, "epochs": epochs, "batch": batch, "plots": False, "close_mosaic": 2, "cache": "ram",
        "val": True, "amp": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = extract(
            ExtractSettings(teacher, data, Path(folder) / "cache", views=views, plain_views=1, imgsz=imgsz, batch=batch)
        )
        tasks = [
            (arm, losses, made.path, data.resolve(), Path(folder), settings, threads) for arm, losses in arms.items()
        ]
        with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=4) as pool:
            figures = {}
            for arm, found in pool.imap(one_run, tasks):
                figures[arm] = found
                for term, fell in found["terms"].items():
                    share = fell["share"]
                    click.echo(
                        f"{arm:18} {term:8} {fell['first']:.4g} -> {fell['last']:.4g}  share {share['median']:.3f} "
                        f"[{share['min']:.3f}, {share['max']:.3f}]  warnings {len(found['warnings'])}"
                    )
    file = record.write(
        name,
        {"teacher": teacher.name, "data": data.name, "student": student, "imgsz": imgsz, "epochs": epochs,
         "batch": batch, "views": views, "torch": torch.__version__},
        figures,
    )  # fmt: skip
    click.echo(str(file))


if __name__ == "__main__":
    main()
