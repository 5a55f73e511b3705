"""In: a teacher and its data set. Out: what a training epoch takes from a bucket and from a folder, and its requests.

One cache is extracted into a folder and into a bucket of moto, a server on this machine, written in Python: its
requests are real, its speed is not that of any store. Then a student is trained from each, in processes of their own
that do their epochs in turn, an epoch of one beside one of the other. Every epoch shows another view, and the bucket's
run may keep two and a half of them, so each view is fetched while the one before is trained, and dropped. `requests`
are counted in the server's log.

python scripts/bench/bucket.py --teacher best.pt --data bccd.yaml
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO, Any

import click
import record

from cache_kd.cache import layout
from cache_kd.cache.places import parse_place
from cache_kd.cache.reader import CacheReader
from cache_kd.losses import parse_losses
from cache_kd.pipeline import training
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.fetching import arrays_read, shard_entries
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import train
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

BUCKET = "bench"
LOSSES = ("cwd", "ld")
HELD = 2.5
"""Views that the local copies may take."""
_REQUEST = re.compile(r'"(GET|PUT|HEAD|POST|DELETE) ')


def count(log: Path) -> int:
    """Return the requests in a server's log."""
    return len(_REQUEST.findall(log.read_text(encoding="utf-8", errors="replace")))


def train_in_turn(told: dict[str, Any], gate: IO[str], report: IO[str]) -> None:
    """Train from one place; begin every epoch when a line says so, and report its seconds and the server's requests."""
    log, noted = Path(told["log"]), [0.0, count(Path(told["log"]))]

    class Timed(DistillTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback("on_train_epoch_start", self.begin)
            self.add_callback("on_train_epoch_end", self.end)

        def begin(self, _: Any) -> None:
            gate.readline()
            noted[0] = time.perf_counter()

        def end(self, _: Any) -> None:
            seconds, asked = time.perf_counter() - noted[0], count(log)
            report.write(json.dumps([seconds, asked - noted[1]]) + "\n")
            report.flush()
            noted[1] = asked

    training.DistillTrainer = Timed  # type: ignore[misc]  # the bench looks into the trainer that `train` makes
    train(
        TrainSettings(
            "yolov8n.yaml",
            cache=parse_place(told["place"]),
            data=Path(told["data"]),
            losses=LOSSES,
            fetch_limit=told["limit"],
            settings=told["settings"],
        )
    )


def view_bytes(place: str) -> int:
    """Return what a training with `LOSSES` reads of a view."""
    cache = Cache(place)
    needs = frozenset[str]().union(*(spec.needs for spec in parse_losses(list(LOSSES))))
    arrays = arrays_read(cache, cache.codec.columns_for(needs), proven=True)
    shards = range(-(-cache.manifest.num_images // cache.manifest.shard_size))
    return sum(entry.bytes for n in shards for entry in shard_entries(cache, cache.views[0], arrays, n))


def start_server(log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start moto with a bucket; return its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as file:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
            return server, address
        except OSError:
            time.sleep(0.1)
    raise click.ClickException("moto did not start; pip install -e '.[dev]'")


def start_training(told: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """Start `train_in_turn` in a process of its own, with an empty folder of local copies."""
    environment = {**os.environ, "CACHE_KD_FETCH_FOLDER": tempfile.mkdtemp(dir=folder)}
    words = [sys.executable, __file__, "--child", json.dumps(told)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def epoch(arm: subprocess.Popen[str]) -> tuple[float, int]:
    """Let a training do its next epoch; return its seconds and requests."""
    assert arm.stdin is not None and arm.stdout is not None
    arm.stdin.write("go\n")
    arm.stdin.flush()
    said = arm.stdout.readline()
    if not said:
        raise click.ClickException("a training ended early; run one by hand: cache-kd train --cache …")
    seconds, requests = json.loads(said)
    return float(seconds), int(requests)


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--imgsz", default=160, show_default=True)
@click.option("--fraction", default=0.4, show_default=True, help="Share of the training images.")
@click.option("--shard", default=32, show_default=True, help="Images of a shard.")
@click.option("--epochs", default=12, show_default=True, help="And views.")
@click.option("--batch", default=16, show_default=True)
@click.option("--child", hidden=True)
def main(teacher: Path, data: Path, imgsz: int, fraction: float, shard: int, epochs: int, batch: int,
         child: str | None) -> None:  # fmt: skip
    """Measure it."""
    if child is not None:
        report = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train_in_turn(json.loads(child), sys.stdin, report)
        return
    layout.MAX_SAMPLES = shard
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "server.log"
        server, address = start_server(log)
        os.environ.update(
            AWS_ENDPOINT_URL=address, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_REGION="us-east-1"
        )
        arms: dict[str, subprocess.Popen[str]] = {}
        try:
            places = {"folder": str(folder / "cache"), "bucket": f"s3://{BUCKET}/cache"}
            written: dict[str, Any] = {}
            for arm, place in places.items():
                before, started = count(log), time.perf_counter()
                extract(
                    ExtractSettings(
                        teacher, data=data, cache=parse_place(place), views=epochs, plain_views=0, imgsz=imgsz,
                        batch=batch, augment={"fraction": fraction},
                    )
                )  # fmt: skip
                written[arm] = {"seconds": time.perf_counter() - started, "requests": count(log) - before}
            settings = {
                "epochs": epochs, "batch": batch, "workers": 0, "val": False, "plots": False, "device": "cpu",
                "close_mosaic": 0, "save": False, "project": str(folder / "runs"),
            }  # fmt: skip
            size = view_bytes(places["folder"])
            told = {"data": str(data.resolve()), "log": str(log), "settings": settings, "limit": int(HELD * size)}
            arms = {arm: start_training({**told, "place": place}, folder) for arm, place in places.items()}
            seconds: dict[str, list[float]] = {arm: [] for arm in arms}
            requests: dict[str, list[int]] = {arm: [] for arm in arms}
            for turn in range(epochs):
                for arm in list(arms)[:: 1 if turn % 2 else -1]:
                    took, asked = epoch(arms[arm])
                    seconds[arm].append(took)
                    requests[arm].append(asked)
            manifest = CacheReader(places["folder"]).manifest
        finally:
            for process in (*arms.values(), server):
                process.kill()
                process.wait()
    pairs = [there / here for there, here in zip(seconds["bucket"][1:], seconds["folder"][1:], strict=True)]
    figures = {
        "written": written,
        "seconds": seconds,
        "bucket_over_folder_after_the_first": record.spread(pairs),
        "sums_after_the_first": sum(seconds["bucket"][1:]) / sum(seconds["folder"][1:]),
        "requests": requests["bucket"],
        "bytes_of_a_view": size,
        "images": manifest.num_images,
        "shards_of_a_view": -(-manifest.num_images // manifest.shard_size),
    }
    chosen = {"imgsz": imgsz, "shard": shard, "epochs": epochs, "batch": batch, "losses": LOSSES, "views_held": HELD}
    click.echo(json.dumps(figures, indent=1))
    click.echo(record.write("bucket", chosen, figures))


if __name__ == "__main__":
    main()
