"""In: a size. Out: how fast `cache-kd verify` reads and hashes a cache of that size, by number of threads.

python scripts/bench/verify_speed.py --megabytes 400
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import record

from cache_kd.cache.verify import verify_cache
from cache_kd.cache.writer import CacheWriter
from cache_kd.structures import Column, HeadSpec, Tap, View

VIEW = View("mixed", 0)
GIVEN = {
    "teacher": {},
    "head": HeadSpec((Tap("P3", 4, 8),), 16, ("thing",)),
    "codec": {},
    "imgsz": 320,
    "seed": 0,
    "recipe": {},
    "environment": {},
}


def write(path: Path, megabytes: int, row_bytes: int) -> int:
    """Write rows that do not compress, as many as it takes; returns the bytes of the shard files."""
    column = Column("features", "u1", (row_bytes,))
    rng = np.random.default_rng(0)
    count = max(1, megabytes * 10**6 // row_bytes)
    with CacheWriter.open_or_create(
        path, identity={}, data={}, columns=(column,), num_images=count, teacher_arrays={}
    ) as writer:
        for shard in writer.units(VIEW):
            rows = [rng.integers(0, 256, row_bytes, np.uint8) for _ in writer.samples(shard)]
            writer.write_unit(VIEW, shard, {"features": rows}, {})
        writer.finish([VIEW], GIVEN)
    return sum(file.stat().st_size for file in path.glob("views/*/*/c/**/*") if file.is_file())


@click.command()
@click.option("--megabytes", default=400)
@click.option("--row-bytes", default=100_000, help="of a sample; 100 kB is a view at 320 pixels, default fidelity")
@click.option("--jobs", "threads", multiple=True, type=int, default=(1, 2))
@click.option("--repeat", default=3)
def main(megabytes: int, row_bytes: int, threads: tuple[int, ...], repeat: int) -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder, "cache"), megabytes, row_bytes)
        for jobs in threads:
            speeds = []
            for _ in range(repeat):
                started = time.perf_counter()
                assert verify_cache(Path(folder, "cache"), jobs=jobs).ok
                speeds.append(size / 1e6 / (time.perf_counter() - started))
            figures[f"{jobs} threads, MB/s"] = record.spread(speeds)
            click.echo(f"{jobs} threads: {figures[f'{jobs} threads, MB/s']['median']:.0f} MB/s")
    settings = {"megabytes": size / 1e6, "row_bytes": row_bytes, "repeat": repeat, "files": "in the page cache"}
    click.echo(str(record.write("verify-speed", settings, figures)))


if __name__ == "__main__":
    main()
