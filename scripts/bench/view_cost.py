"""In: teachers and their data sets. Out: CPU seconds of every step of one view's extraction, and its bytes by array.

Seconds are those of all cores together, so that neighbours on the machine do not count: a machine of n idle cores that
shares the work well takes an n-th. No rows are written; compressing them is in the coding.

python scripts/bench/view_cost.py --pair best.pt bccd.yaml 320 --pair best.pt bccd.yaml 640
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import click
import record

from cache_kd.cache.layout import shard_size
from cache_kd.codecs import FIDELITIES
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.preparation import make_plan
from cache_kd.structures import View

PATH = click.Path(path_type=Path)


@click.command()
@click.option("--pair", "pairs", type=(PATH, PATH, int), multiple=True, required=True)
@click.option("--items", default=48)
def main(pairs: tuple[tuple[Path, Path, int], ...], items: int) -> None:
    figures = {}
    for teacher, data, imgsz in pairs:
        with tempfile.TemporaryDirectory() as folder:
            settings = ExtractSettings(teacher, data, Path(folder) / "c", imgsz=imgsz)
            plan = make_plan(settings, click.echo)
            codecs = {name: plan.codec(name) for name in FIDELITIES}
            views = [View("mixed", number) for number in range(8)]
            with mock.patch.object(time, "perf_counter", time.process_time):
                probed = plan.probe(codecs, views, items=items, most=items)
        figures[f"{teacher.name} {data.name} {imgsz}"] = {
            "cpu_seconds": asdict(probed.seconds),
            "items": probed.items,
            "shard_size": {name: shard_size(plan.columns(codec)) for name, codec in codecs.items()},
            "bytes": {
                name: {array: float(sizes.mean()) for array, sizes in kinds["mixed"].items()}
                for name, kinds in probed.sizes.items()
            },
        }
    click.echo(str({name: found["cpu_seconds"] for name, found in figures.items()}))
    click.echo(str(record.write("view-cost", {"items": items}, figures)))


if __name__ == "__main__":
    main()
