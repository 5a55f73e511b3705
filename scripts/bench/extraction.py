"""In: a teacher and its data set. Out: seconds of an extraction over those of the bare forward with the same loading.

Shard by shard in turn: `bare` makes the views and runs the stock model over them; `extract` is all of it: views,
forward, statistics, codec, hashes, compression, sha256, fsync, records.

python scripts/bench/extraction.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import record
import torch

from cache_kd.pipeline import extraction
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.structures import View
from cache_kd.teacher.extract import Unit, extract_units, view_batches
from cache_kd.ultralytics_bridge.teacher import load_teacher


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--fidelity", default="default")
@click.option("--batch", default=16)
@click.option("--views", default=3)
def main(teacher: Path, data: Path, fidelity: str, batch: int, views: int) -> None:
    bare_model = copy.deepcopy(load_teacher(teacher).model)
    seconds: dict[str, list[float]] = {"bare": [], "extract": []}
    with tempfile.TemporaryDirectory() as folder:
        settings = extraction.ExtractSettings(
            teacher, data, Path(folder) / "cache", views=views, plain_views=0, fidelity=fidelity, batch=batch
        )
        job = extraction.prepare(settings, click.echo)
        torch.set_num_threads(cpu_threads())

        def bare(unit: Unit) -> None:
            for _, _, samples in view_batches(
                job.dataset, [unit], shard_size=job.writer.shard_size, batch=batch, workers=0
            ):
                images = torch.from_numpy(np.stack([sample.pixels for sample in samples])).float() / 255
                with torch.inference_mode():
                    bare_model(images)

        def whole(unit: Unit) -> None:
            extract_units(
                [unit], dataset=job.dataset, teacher=job.teacher, codec=job.codec, writer=job.writer, batch=batch,
                workers=0, environment=job.environment, progress=lambda _: None,
            )  # fmt: skip

        bare(Unit(View("mixed", 0), 0))  # warms up
        for number in range(views):
            for shard in job.writer.units(View("mixed", number)):
                unit = Unit(View("mixed", number), shard)
                order = [("bare", bare), ("extract", whole)]
                for arm, run in order if (number + shard) % 2 else order[::-1]:
                    started = time.perf_counter()
                    run(unit)
                    seconds[arm].append(time.perf_counter() - started)
        job.writer.close()
    pairs = [whole / alone for whole, alone in zip(seconds["extract"], seconds["bare"], strict=True)]
    figures = {"seconds": {arm: record.spread(taken) for arm, taken in seconds.items()}, "ratio": record.spread(pairs)}
    figures["ratio_of_sums"] = {"value": sum(seconds["extract"]) / sum(seconds["bare"])}
    click.echo(
        f"extract over bare forward and loading: {figures['ratio']} (sums {figures['ratio_of_sums']['value']:.3f})"
    )
    arms = {"teacher": teacher.name, "data": data.name, "fidelity": fidelity, "batch": batch, "views": views}
    click.echo(str(record.write("extraction", arms, figures)))


if __name__ == "__main__":
    main()
