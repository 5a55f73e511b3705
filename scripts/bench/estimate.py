"""In: a teacher and its data set. Out: what `cache-kd estimate` foresees, bytes and seconds, beside the extraction.

Replayed and packed views in turn, estimate and extraction after each other, in processes of their own. Seconds are
those of the units, as `cache-kd inspect` shows them, and those of all that follows the loading, its own probe included.

python scripts/bench/estimate.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import record

ARMS = {"replay": "none", "packed": "jpeg"}


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--imgsz", default=160)
@click.option("--views", default=1)
@click.option("--rounds", default=3)
def main(teacher: Path, data: Path, imgsz: int, views: int, rounds: int) -> None:
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    for _ in range(rounds):
        for arm, pack in ARMS.items():
            with tempfile.TemporaryDirectory() as folder:
                cache = str(Path(folder) / "cache")
                words = ["--teacher", str(teacher), "--data", str(data), "--imgsz", str(imgsz), "--views", str(views)]
                words += ["--pack", pack, "--cache", cache, "--json"]
                foreseen = next(row for row in call("estimate", *words)["rows"] if row["chosen"])
                done = call("extract", *words)
                costs = call("inspect", cache, "--json")["costs"]
                size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
            figures = {
                "bytes estimated": foreseen["bytes"],
                "bytes": size,
                "seconds estimated": foreseen["seconds"],
                "seconds of units": costs["seconds"]["total"],
                "seconds of all": done["seconds"],
            }
            figures["bytes ratio"] = figures["bytes estimated"] / figures["bytes"]
            figures["seconds ratio"] = figures["seconds estimated"] / figures["seconds of units"]
            for name, value in figures.items():
                found[arm].setdefault(name, []).append(value)
            click.echo(f"{arm}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    settings: dict[str, Any] = {"data": data.stem, "imgsz": imgsz, "views": views, "plain_views": 1, "rounds": rounds}
    spreads = {arm: {name: record.spread(values) for name, values in one.items()} for arm, one in found.items()}
    click.echo(record.write(f"estimate-{data.stem}-{imgsz}", settings, spreads))


def call(*words: str) -> Any:
    """Return the JSON that a command prints."""
    done = subprocess.run([sys.executable, "-m", "cache_kd", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
