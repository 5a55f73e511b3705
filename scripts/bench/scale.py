"""In: a number of images and views. Out: what a cache of that size asks of those who open it: bytes, seconds, memory.

Lists, records and manifest are the program's own, the rows are not there (see `synthetic_cache`). Every step is a
process of its own, so that its peak memory is its own. `--scan` names a folder of images and their labels: what it
costs to hash and to check one of them, which a training on source images does with all of them before it starts.

python scripts/bench/scale.py --images 1000000 --views 20 --scan data.yaml
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import record
from synthetic_cache import SyntheticCache

from cache_kd.cache.reader import CacheReader
from cache_kd.fingerprint import compare_sources
from cache_kd.pipeline.caches import list_caches
from cache_kd.pipeline.inspection import describe
from cache_kd.pipeline.locations import newest_cache
from cache_kd.pipeline.opened import Cache
from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.settings import default_settings
from cache_kd.views.recipe import Recipe

Step = Callable[[SyntheticCache], Any]


def find(made: SyntheticCache) -> None:
    """Find the newest cache of the default place."""
    os.environ["CACHE_KD_CACHE"] = str(made.path.parent)
    newest_cache()


def open_reader(made: SyntheticCache) -> None:
    """Open the cache and check what it holds."""
    _ = Cache(made.path).codec


def first_row(made: SyntheticCache) -> None:
    """Open it and look up where the first row of a view lies."""
    cache = Cache(made.path)
    layout = cache.reader.layouts["features"]
    _ = cache.reader.files(cache.views[0])[layout.shard_path(cache.views[0], 0)]


def read_images(made: SyntheticCache) -> None:
    """Read the list of images."""
    _ = Cache(made.path).images


def train(made: SyntheticCache) -> None:
    """All that a training does with the cache before its first batch, images compared as they are found."""
    find(made)
    cache = Cache(made.path)
    _ = cache.codec
    found = tuple(cache.images)
    compare_sources(cache.images, found)
    layout = cache.reader.layouts["features"]
    _ = cache.reader.files(cache.views[0])[layout.shard_path(cache.views[0], 0)]


def worker(made: SyntheticCache) -> dict[str, float]:
    """A worker of a long training: it reads of one view after the other; returns the memory held after 1 and all."""
    reader, held = CacheReader(made.path), []
    layout = reader.layouts["features"]
    before = memory("VmRSS")
    for view in reader.manifest.views:
        _ = reader.files(view)[layout.shard_path(view, 0)]
        gc.collect()
        held.append(memory("VmRSS") - before)
    return {"bytes_after_one_view": held[0], "bytes_after_all_views": held[-1]}


def inspect(made: SyntheticCache) -> None:
    """What `cache-kd inspect` gathers; the records of the units are those of the first view only."""
    describe(made.path)


def listing(made: SyntheticCache) -> None:
    """What `cache-kd list` gathers."""
    list_caches(made.path.parent)


def begin(made: SyntheticCache) -> None:
    """What an extraction does with the cache's folder before its first unit: it is there already."""
    made.open_writer().close()


def finish(made: SyntheticCache) -> None:
    """What the end of an extraction does for one view: every record and shard looked at, lists and manifest written."""
    (made.path / "manifest.json").unlink()  # it lists views of which there are no records here
    with made.open_writer() as writer:
        writer.finish(made.view_list[:1], made.given)


def memory(key: str) -> float:
    """Return a figure of this process's memory in bytes: VmRSS what it holds, VmHWM the most it held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024.0


def read_bytes() -> int:
    """Return the bytes that this process asked the system for."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar:"))
    return int(line.split()[1])


def _measured(step: Step, made: SyntheticCache, answer: Any) -> None:
    if step in (begin, finish):
        _ = made.identity, made.data  # which the scan of the data set gives
    before, peak, already = memory("VmRSS"), memory("VmHWM"), read_bytes()
    started, busy = time.perf_counter(), time.process_time()
    more = step(made) or {}
    taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
    over = max(0.0, memory("VmHWM") - max(before, peak))
    answer.send({**taken, "peak_bytes": over, "read_bytes": read_bytes() - already, **more})


def measure(step: Step, made: SyntheticCache) -> dict[str, float]:
    """Return seconds, the most memory beyond what the imports take, and bytes read, of one step in a new process."""
    spawning = multiprocessing.get_context("spawn")
    taker, answer = spawning.Pipe(duplex=False)
    process = spawning.Process(target=_measured, args=(step, made, answer))
    process.start()
    answer.close()  # so that a process that died is an end of file here
    found: dict[str, float] = taker.recv()
    process.join()
    click.echo(f"{step.__name__}: {found}")
    return found


def sizes(path: Path) -> dict[str, int]:
    """Return the bytes of one file of each sort."""
    names = ("manifest.json", "zarr.json", "data.json", "views/mixed-0000/shards.json", "units/mixed-0000-00000.json")
    return {name: (path / name).stat().st_size for name in names}


def scan(data: Path, images: int) -> dict[str, float]:
    """Return the CPU seconds an image of Ultralytics' check of images and labels, and of hashing both."""
    files, recipe = load_data(data), Recipe.from_settings(default_settings())
    dataset = ViewDataset(files, recipe=recipe, imgsz=640, seed=0)  # the first one imports things
    started = time.process_time()
    dataset = ViewDataset(files, recipe=recipe, imgsz=640, seed=0)
    checked = time.process_time()
    sources = dataset.sources()
    hashed = time.process_time()
    count = len(sources)
    each = {"check": (checked - started) / count, "hash": (hashed - checked) / count}
    return {
        "images": count,
        "bytes_per_image": sum(source.bytes for source in sources) / count,
        **{f"{name}_cpu_seconds_per_image": value for name, value in each.items()},
        **{f"{name}_cpu_seconds_extrapolated": value * images for name, value in each.items()},
    }


STEPS: tuple[Step, ...] = (find, open_reader, first_row, read_images, train, worker, inspect, listing, begin, finish)


@click.command()
@click.option("--images", default=1_000_000)
@click.option("--views", default=20)
@click.option("--scan", "data", type=click.Path(path_type=Path))
@click.option("--folder", type=click.Path(path_type=Path), help="where to write; default: the temporary folder")
@click.option("--only", multiple=True, help="steps to measure; nothing is recorded then")
def main(images: int, views: int, data: Path | None, folder: Path | None, only: tuple[str, ...]) -> None:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = SyntheticCache(Path(place) / "caches" / "c", images, views)
        made.path.parent.mkdir()
        manifest = made.write()
        units = made.write_records(1, files=True)
        bare = SyntheticCache(made.path, images, views)  # nothing computed yet: what a new process is given
        figures["sizes"] = sizes(made.path)
        columns = len(CacheReader(made.path).layouts)
        figures["counts"] = {"units_a_view": units, "arrays": columns, "shard_size": manifest.shard_size,
                             "objects": views * (units * (columns + 1) + columns + 2)}  # fmt: skip
        click.echo(str(figures))
        for step in STEPS:
            if not only or step.__name__ in only:
                figures[step.__name__] = measure(step, bare)
    if data is not None:
        figures["scan"] = scan(data, images)
        click.echo(str(figures["scan"]))
    if not only:
        click.echo(str(record.write("scale", {"images": images, "views": views, "units with records": units}, figures)))


if __name__ == "__main__":
    main()
