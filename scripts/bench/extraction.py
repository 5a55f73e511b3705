"""In: a teacher and its data set. Out: seconds of an extraction over those of the bare forward with the same loading.

Shard by shard in turn: `bare` makes the views and runs the stock model over them; `extract` is all of it: views,
forward, statistics, codec, hashes, compression, sha256, fsync, records. Then each alone in a process of its own, for
the most memory that it holds.

python scripts/bench/extraction.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import record
import torch

from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.preparation import prepare
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.structures import View
from cache_kd.teacher.extract import Unit, ViewBatches, extract_units
from cache_kd.ultralytics_bridge.teacher import load_teacher


def prepared(teacher: Path, data: Path, folder: str, views: int, fidelity: str, batch: int) -> Any:
    """Return an extraction that has not begun."""
    settings = ExtractSettings(
        teacher, data, Path(folder) / "cache", views=views, plain_views=0, fidelity=fidelity, batch=batch
    )
    job = prepare(settings, click.echo)
    torch.set_num_threads(cpu_threads())
    return job


def bare(job: Any, model: torch.nn.Module, unit: Unit, batch: int) -> None:
    """Make the views of a unit and run the model over them."""
    for made in ViewBatches(job.dataset, [unit], shard_size=job.writer.shard_size, batch=batch, workers=0):
        images = torch.from_numpy(np.stack([sample.pixels for sample in made.views])).float() / 255
        with torch.inference_mode():
            model(images)


def whole(job: Any, unit: Unit, batch: int) -> None:
    """Extract a unit."""
    extract_units(
        [unit], dataset=job.dataset, teacher=job.teacher, codec=job.codec, writer=job.writer, batch=batch,
        workers=0, environment=job.environment,
    )  # fmt: skip


def peak_of(arm: str, teacher: Path, data: Path, fidelity: str, batch: int, answer: Any) -> None:
    """Put the largest resident memory, in bytes, of a process that does one view of the data set."""
    with tempfile.TemporaryDirectory() as folder:
        job = prepared(teacher, data, folder, 1, fidelity, batch)
        model = copy.deepcopy(load_teacher(teacher).model) if arm == "bare" else None
        for shard in job.writer.units(View("mixed", 0)):
            unit = Unit(View("mixed", 0), shard)
            if model is not None:
                bare(job, model, unit, batch)
            else:
                whole(job, unit, batch)
        job.writer.close()
    # getrusage's ru_maxrss would count what the parent held when this process was forked
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    answer.put(int(line.split()[1]) * 1024)


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--fidelity", default="default")
@click.option("--batch", default=16)
@click.option("--views", default=3)
def main(teacher: Path, data: Path, fidelity: str, batch: int, views: int) -> None:
    model = copy.deepcopy(load_teacher(teacher).model)
    seconds: dict[str, list[float]] = {"bare": [], "extract": []}
    with tempfile.TemporaryDirectory() as folder:
        job = prepared(teacher, data, folder, views, fidelity, batch)
        arms: dict[str, Callable[[Unit], None]] = {
            "bare": lambda unit: bare(job, model, unit, batch),
            "extract": lambda unit: whole(job, unit, batch),
        }
        arms["bare"](Unit(View("mixed", 0), 0))  # warms up
        for number in range(views):
            for shard in job.writer.units(View("mixed", number)):
                unit = Unit(View("mixed", number), shard)
                for arm in list(arms) if (number + shard) % 2 else list(arms)[::-1]:
                    started = time.perf_counter()
                    arms[arm](unit)
                    seconds[arm].append(time.perf_counter() - started)
        job.writer.close()
    spawning = multiprocessing.get_context("spawn")
    peaks = {}
    for arm in arms:
        answer = spawning.SimpleQueue()
        process = spawning.Process(target=peak_of, args=(arm, teacher, data, fidelity, batch, answer))
        process.start()
        peaks[arm] = answer.get()
        process.join()
    pairs = [whole / alone for whole, alone in zip(seconds["extract"], seconds["bare"], strict=True)]
    figures = {
        "seconds": {arm: record.spread(taken) for arm, taken in seconds.items()},
        "ratio": record.spread(pairs),
        "ratio_of_sums": {"value": sum(seconds["extract"]) / sum(seconds["bare"])},
        "peak_memory_bytes": peaks,
    }
    click.echo(
        f"extract over bare forward and loading: {figures['ratio']} (sums {figures['ratio_of_sums']['value']:.3f}); "
        f"peak memory {peaks['extract'] / 1e6:.0f} MB over {peaks['bare'] / 1e6:.0f} MB"
    )
    settings = {"teacher": teacher.name, "data": data.name, "fidelity": fidelity, "batch": batch, "views": views}
    click.echo(str(record.write("extraction", settings, figures)))


if __name__ == "__main__":
    main()
