"""In: a teacher and its data set. Out: seconds and memory of one extraction by each engine, all with the same digest.

Arms, in turn: this machine's one process; two processes; Ray on a local cluster of two nodes with one CPU each; all at
one torch thread a worker. A job's seconds are those of the whole command; memory is the largest sum over its processes
of what each holds for itself and its share of the rest (PSS), Ray's own processes apart.

python scripts/bench/engines.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import psutil
import record

SAMPLE = 0.5


def memory(processes: Iterable[psutil.Process]) -> int:
    """Return the bytes that these processes hold together; those that ended meanwhile hold none."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that it started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def actors(roots: list[psutil.Process]) -> list[psutil.Process]:
    """Return the workers of a local Ray cluster that run something."""
    found = []
    for process in (child for root in roots for child in family(root)):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def job(words: list[str], roots: list[psutil.Process]) -> dict[str, Any]:
    """Run one extraction; returns its seconds, those until its first unit, its memory and its digest."""
    with tempfile.TemporaryDirectory() as folder:
        cache, first, peak, own = Path(folder) / "cache", None, 0, 0
        started = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, "-m", "cache_kd", *words, "--cache", str(cache), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while run.poll() is None:
            time.sleep(SAMPLE)
            if first is None and list(cache.glob("units/*.json")):
                first = time.perf_counter() - started
            workers = actors(roots)
            peak = max(peak, memory([*family(psutil.Process(run.pid)), *workers]) if run.poll() is None else 0)
            rest = {process.pid for process in workers}
            own = max(own, memory(child for root in roots for child in family(root) if child.pid not in rest))
        seconds = time.perf_counter() - started
        assert run.stdout is not None
        done = json.loads(run.stdout.read())
        return {
            "seconds": seconds,
            "extracting": done["seconds"],
            "first_unit": first,
            "memory": peak,
            "ray_memory": own,
            "digest": done["digest"],
            "items": done["items_extracted"],
        }


def local_cluster() -> tuple[Any, float]:
    """Start a Ray cluster of two nodes on this machine; returns it and the seconds that took."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    started = time.perf_counter()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    return cluster, time.perf_counter() - started


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--views", default=4)
@click.option("--imgsz", default=160)
@click.option("--batch", default=16)
@click.option("--rounds", default=2)
def main(teacher: Path, data: Path, views: int, imgsz: int, batch: int, rounds: int) -> None:
    words = ["extract", f"--teacher={teacher}", f"--data={data}", f"--views={views}", "--plain-views=0"]
    words += [f"--imgsz={imgsz}", f"--batch={batch}", "--device=cpu", "--workers=0", "--threads=1"]
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    found: dict[str, list[dict[str, Any]]] = {"one process": [], "two processes": [], "ray, two nodes": []}
    for _ in range(rounds):
        found["one process"].append(job(words, []))
        found["two processes"].append(job([*words, "--processes=2"], []))
        before = {child.pid for child in psutil.Process().children()}
        cluster, seconds = local_cluster()
        try:
            roots = [child for child in psutil.Process().children() if child.pid not in before]
            made = job([*words, "--engine=ray", f"--address={cluster.address}"], roots)
            found["ray, two nodes"].append({**made, "cluster_start": seconds})
        finally:
            cluster.shutdown()
        for arm, jobs in found.items():
            click.echo(f"{arm}: {jobs[-1]}")
    digests = {made["digest"] for jobs in found.values() for made in jobs}
    alone = [made["extracting"] for made in found["one process"]]
    figures: dict[str, Any] = {"digests": sorted(digests), "arms": {}}
    for arm, jobs in found.items():
        measured = [key for key in jobs[0] if key not in ("digest", "items")]
        figures["arms"][arm] = {
            key: record.spread([made[key] for made in jobs if made[key]] or [0.0]) for key in measured
        }
        ratios = [made["extracting"] / one for made, one in zip(jobs, alone, strict=True)]
        figures["arms"][arm]["over_one_process"] = record.spread(ratios)
    figures["items"] = found["one process"][0]["items"]
    settings = {"teacher": teacher.name, "data": data.name, "views": views, "imgsz": imgsz, "batch": batch}
    click.echo(str(record.write("engines", {**settings, "load": os.getloadavg()[0]}, figures)))
    if len(digests) > 1:
        raise click.ClickException(f"the engines made different caches: {sorted(digests)}")


if __name__ == "__main__":
    main()
