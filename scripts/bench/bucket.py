"""In: a teacher and its data set. Out: what a training epoch takes from a bucket and from a folder, and its requests.

One cache is extracted into a folder and into a bucket of moto, a server on this machine, written in Python: its
requests are real, its speed is not that of any store. Then a student is trained from either in turn, each in a process
of its own, from the bucket with an empty folder of local copies. Every epoch shows another view, so every epoch of the
bucket's run reads shards that were fetched while the epoch before was trained. `seconds` are those of the epochs after
the first; `requests` are counted in the server's log.

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
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import record

from cache_kd.cache import layout
from cache_kd.cache.places import parse_place
from cache_kd.cache.reader import CacheReader
from cache_kd.pipeline import training
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import train
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

BUCKET = "bench"
LOSSES = ("cwd", "ld")
_REQUEST = re.compile(r'"(GET|PUT|HEAD|POST|DELETE) ')


def count(log: Path) -> int:
    """Return the requests in a server's log."""
    return len(_REQUEST.findall(log.read_text(encoding="utf-8", errors="replace")))


def train_once(told: dict[str, Any]) -> dict[str, Any]:
    """Train from one place; return the seconds and the server's requests of every epoch."""
    seconds: list[float] = []
    requests: list[int] = []
    log = Path(told["log"])

    class Timed(DistillTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback("on_train_epoch_start", lambda _: seconds.append(-time.perf_counter()))
            self.add_callback("on_train_epoch_end", self.noted)

        def noted(self, _: Any) -> None:
            seconds[-1] += time.perf_counter()
            requests.append(count(log))

    training.DistillTrainer = Timed  # type: ignore[misc]  # the bench looks into the trainer that `train` makes
    before = count(log)
    settings = TrainSettings(
        "yolov8n.yaml",
        cache=parse_place(told["place"]),
        data=Path(told["data"]),
        losses=LOSSES,
        settings={**told["settings"], "project": told["project"]},
    )
    train(settings)
    return {"seconds": seconds, "requests": [after - prior for prior, after in pairwise([before, *requests])]}


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


def in_a_process(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run `train_once` in a process of its own, with an empty folder of local copies."""
    answer = folder / "answer.json"
    environment = {**os.environ, "CACHE_KD_FETCH_FOLDER": str(Path(tempfile.mkdtemp(dir=folder)))}
    words = [sys.executable, __file__, "--child", json.dumps({**told, "answer": str(answer)})]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    return dict(json.loads(answer.read_text()))


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--imgsz", default=160, show_default=True)
@click.option("--fraction", default=0.4, show_default=True, help="Share of the training images.")
@click.option("--shard", default=32, show_default=True, help="Images of a shard.")
@click.option("--epochs", default=5, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--child", hidden=True)
def main(teacher: Path, data: Path, imgsz: int, fraction: float, shard: int, epochs: int, batch: int, repeats: int,
         child: str | None) -> None:  # fmt: skip
    """Measure it."""
    if child is not None:
        told = json.loads(child)
        Path(told["answer"]).write_text(json.dumps(train_once(told)))
        return
    layout.MAX_SAMPLES = shard
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "server.log"
        server, address = start_server(log)
        try:
            os.environ.update(
                AWS_ENDPOINT_URL=address, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_REGION="us-east-1"
            )
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
                "close_mosaic": 0,
            }  # fmt: skip
            runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in places}
            for turn in range(repeats):
                for arm in list(places)[:: 1 if turn % 2 else -1]:
                    told = {"place": places[arm], "data": str(data.resolve()), "log": str(log), "settings": settings,
                            "project": str(folder / "runs")}  # fmt: skip
                    runs[arm].append(in_a_process(told, folder))
            manifest = CacheReader(places["folder"]).manifest
        finally:
            server.kill()
    seconds = {arm: [s for run in done for s in run["seconds"][1:]] for arm, done in runs.items()}
    first = {arm: [run["seconds"][0] for run in done] for arm, done in runs.items()}
    medians = {arm: record.spread(values) for arm, values in seconds.items()}
    figures = {
        "written": written,
        "seconds": medians,
        "seconds_of_the_first": {arm: record.spread(values) for arm, values in first.items()},
        "ratio": medians["bucket"]["median"] / medians["folder"]["median"],
        "ratio_of_sums": sum(seconds["bucket"]) / sum(seconds["folder"]),
        "requests": [run["requests"] for run in runs["bucket"]],
        "images": manifest.num_images,
        "shards_of_a_view": -(-manifest.num_images // manifest.shard_size),
    }
    chosen = {"imgsz": imgsz, "shard": shard, "epochs": epochs, "batch": batch, "losses": LOSSES, "repeats": repeats}
    click.echo(json.dumps(figures, indent=1))
    click.echo(record.write("bucket", chosen, figures))


if __name__ == "__main__":
    main()
