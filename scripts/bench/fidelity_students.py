"""In: a teacher and its data set. Out: does the fidelity of the cache matter to the student? mAP of paired seeds.

One exact cache is extracted; the coarser ones are recoded from it, so that all arms but the packed ones train on equal
pixels. A run ends at its last epoch and its averaged weights are judged on `--split`, which neither training nor the
choice of a checkpoint has seen. Finished runs are kept in `--work` and not done again.

python scripts/bench/fidelity_students.py --teacher best.pt --data bccd.yaml --work studies/fidelity
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import click
import record
from ultralytics import YOLO

from cache_kd.codecs import FIDELITIES
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.inspection import describe
from cache_kd.pipeline.recoding import RecodeSettings, recode
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import train

PLAIN, PACKED = "plain", "packed"
ARMS = (PLAIN, "exact", "default", "small", "tiny", PACKED)


def one_run(task: tuple[str, int, Path, Path, Path, tuple[str, ...], dict[str, Any], int]) -> tuple[str, int, dict]:
    """Train one arm with one seed in a process of its own, unless it is done; return its figures."""
    arm, seed, cache, data, work, losses, settings, threads = task
    file = work / "results" / f"{arm}-{seed}.json"
    if file.exists():
        return arm, seed, json.loads(file.read_text())
    name = f"{arm}-{seed}"
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    started = time.perf_counter()
    own = {key: value for key, value in settings.items() if key not in ("model", "split", "imgsz")}
    done = train(
        TrainSettings(
            settings["model"], cache=cache, data=data, losses=("none",) if arm == PLAIN else losses, name=name,
            threads=threads, settings={**own, "seed": seed, "project": str(work / "runs")},
        )
    )  # fmt: skip
    seconds = time.perf_counter() - started
    judged = YOLO(done.folder / "weights" / "last.pt").val(
        data=str(data), split=settings["split"], imgsz=settings["imgsz"], plots=False, verbose=False, workers=0,
        project=str(work / "judged"), name=name, exist_ok=True,
    )  # fmt: skip
    figures = {"mAP50-95": float(judged.box.map), "mAP50": float(judged.box.map50), "seconds": seconds}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(figures))
    return arm, seed, figures


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Caches, runs and results stay here.")
@click.option("--student", default="yolov8n.yaml")
@click.option("--arm", "arms", multiple=True, default=ARMS, help="plain, packed or a fidelity.")
@click.option("--loss", "losses", multiple=True, default=("cwd:weight=2.7", "ld"))
@click.option("--imgsz", default=160)
@click.option("--epochs", default=60)
@click.option("--batch", default=16)
@click.option("--views", default=16)
@click.option("--seeds", default=3)
@click.option("--split", default="test")
@click.option("--jobs", default=2, help="Trainings at once.")
@click.option("--threads", default=1, help="torch threads of each.")
@click.option("--name", default="fidelity-students")
def main(
    teacher: Path,
    data: Path,
    work: Path,
    student: str,
    arms: tuple[str, ...],
    losses: tuple[str, ...],
    imgsz: int,
    epochs: int,
    batch: int,
    views: int,
    seeds: int,
    split: str,
    jobs: int,
    threads: int,
    name: str,
) -> None:
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    finest = ExtractSettings(teacher, data, work / "exact", views=views, imgsz=imgsz, batch=batch, fidelity="exact")
    extract(finest)
    caches = {PLAIN: work / "exact"}
    for arm in arms:
        if arm == PACKED:
            extract(ExtractSettings(teacher, data, work / arm, views=views, imgsz=imgsz, batch=batch, pack="jpeg:95"))
        elif arm in FIDELITIES and arm != "exact":
            recode(RecodeSettings(work / "exact", fidelity=arm, cache=work / arm, data=data, jobs=2), say=click.echo)
        caches.setdefault(arm, work / arm)
    settings: dict[str, Any] = {
        "model": student, "epochs": epochs, "batch": batch, "imgsz": imgsz, "plots": False, "cache": "ram",
        "val": False, "amp": False, "split": split,
    }  # fmt: skip
    tasks = [
        (arm, seed, caches[arm], data.resolve(), work, losses, settings, threads)
        for seed in range(seeds)
        for arm in arms
    ]
    found: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in arms}
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        for arm, seed, figures in pool.imap(one_run, tasks):
            found[arm][seed] = figures
            click.echo(f"{arm:10} seed {seed}  mAP50-95 {figures['mAP50-95']:.4f}  {figures['seconds']:.0f} s")
    table = {}
    for arm in arms:
        facts = describe(caches[arm])
        runs = found[arm]
        table[arm] = {
            "mAP50-95": {**record.spread([run["mAP50-95"] for run in runs.values()]),
                         "mean": sum(run["mAP50-95"] for run in runs.values()) / len(runs)},
            "bytes_per_view": facts["bytes"] / (facts["images"] * len(facts["views"])),
            "runs": runs,
        }  # fmt: skip
        against = found.get("exact", {})
        if set(against) >= set(runs):
            table[arm]["over_exact"] = record.spread(
                [run["mAP50-95"] - against[s]["mAP50-95"] for s, run in runs.items()]
            )
    file = record.write(
        name,
        {"teacher": teacher.name, "data": data.name, **settings, "losses": list(losses), "views": views,
         "seeds": seeds, "jobs": jobs, "threads": threads},
        table,
    )  # fmt: skip
    click.echo(str(file))


if __name__ == "__main__":
    main()
