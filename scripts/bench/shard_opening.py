"""In: a teacher and its data set. Out: CPU time of reading a sample whose shards are open, and of one whose are not.

In a cache of thousands of shards a shuffled epoch finds hardly any shard open and hardly any small array decoded.

python scripts/bench/shard_opening.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import click
import record

from cache_kd.cache.reader import CacheReader
from cache_kd.pipeline.default_losses import arrays_read
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import extract
from cache_kd.pipeline.opened import Cache


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", default=5)
@click.option("--samples", default=300)
def main(teacher: Path, data: Path, rounds: int, samples: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "c"
        extract(ExtractSettings(teacher, data, place, views=1, plain_views=0))
        cache = Cache(place)
        read = set(arrays_read(cache.codec, None))
        columns = tuple(column.name for column in cache.codec.columns if column.name in read)
        reader, view, order = CacheReader(place), cache.views[0], random.Random(0)
        indices = [order.randrange(len(reader)) for _ in range(samples)]
        reader.read(view, 0, columns)
        taken: dict[str, list[float]] = {"open": [], "not open": []}
        for _ in range(rounds):
            for arm, times in taken.items():
                started = time.process_time()
                for index in indices:
                    if arm == "not open":
                        reader.close()
                    reader.read(view, index, columns)
                times.append((time.process_time() - started) / samples)
    figures = {"arrays": len(read), "cpu_seconds": {arm: record.spread(times) for arm, times in taken.items()}}
    click.echo(str(figures))
    click.echo(str(record.write("shard-opening", {"imgsz": cache.manifest.imgsz, "samples": samples}, figures)))


if __name__ == "__main__":
    main()
