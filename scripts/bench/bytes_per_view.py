"""In: teachers and their data sets. Out: bytes on disk of a view for every fidelity, beside raw float32.

python scripts/bench/bytes_per_view.py --pair best.pt bccd.yaml 320 --pair yolov8n.pt coco128.yaml 640
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import record
import torch

from cache_kd.cache.units import measure_rows
from cache_kd.codecs import FIDELITIES
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.preparation import prepare
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.structures import View
from cache_kd.teacher.extract import PIXEL_HASH

PATH = click.Path(path_type=Path)


@click.command()
@click.option("--pair", "pairs", type=(PATH, PATH, int), multiple=True, required=True)
@click.option("--items", default=32)
def main(pairs: tuple[tuple[Path, Path, int], ...], items: int) -> None:
    torch.set_num_threads(cpu_threads())
    figures = {}
    for teacher, data, imgsz in pairs:
        with tempfile.TemporaryDirectory() as folder:
            settings = ExtractSettings(teacher, data, Path(folder) / "c", imgsz=imgsz)
            job = prepare(settings, click.echo)
            job.writer.close()
            keys = [
                (View("mixed", n % 4) if n % 8 else View("plain", 0), n * 3 % len(job.dataset)) for n in range(items)
            ]
            samples = [job.dataset.sample(view, index) for view, index in keys]
            targets = [t for n in range(0, items, 8) for t in job.teacher(samples[n : n + 8], batch=8)]
            raw = sum(level.nbytes for level in targets[0].features)
            raw += targets[0].scores.nbytes + targets[0].boxes.nbytes
            for name in FIDELITIES:
                one = replace(settings, fidelity=name, cache=Path(folder) / name)
                other = prepare(one, click.echo)
                rows: dict[str, list] = {}
                for row in map(other.codec.encode, targets):
                    for column, values in row.items():
                        rows.setdefault(column, []).append(values)
                rows[PIXEL_HASH.name] = [torch.zeros(8, dtype=torch.uint8).numpy()] * items
                columns = (*other.codec.columns, PIXEL_HASH)
                by_array = {n: sizes.sum() for n, sizes in measure_rows(rows, columns, len(job.dataset)).items()}
                size = sum(by_array.values()) / items
                features = sum(level.nbytes for level in targets[0].features)
                feature_bytes = sum(size for name, size in by_array.items() if name.startswith("feature")) / items
                other.writer.close()
                figures[f"{teacher.name} {data.name} {imgsz} {name}"] = {
                    "bytes": size, "fp32_bytes": raw, "times_smaller": raw / size,
                    "features_times_smaller": features / feature_bytes,
                }  # fmt: skip
    for key, value in figures.items():
        click.echo(
            f"{key}: {value['bytes'] / 1e3:.1f} kB a view, {value['times_smaller']:.1f}x under fp32 "
            f"(features alone {value['features_times_smaller']:.1f}x)"
        )
    click.echo(str(record.write("bytes-per-view", {"items": items}, figures)))


if __name__ == "__main__":
    main()
