"""In: a seed. Out: small caches with every sort of column, and rows to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache_kd.cache import CacheWriter, Manifest
from cache_kd.structures import Column, HeadSpec, Tap, View

MIXED, PLAIN = View("mixed", 0), View("plain", 0)
SMALL = (
    Column("features", "u1", (600,), typesize=2),
    Column("half", "f2", (2, 3)),
    Column("labels", "u1", (40,), ragged=True),
    Column("table", "f4", (2,), whole=True),
    Column("pixel_hash", "u1", (8,), whole=True),
)
NUM_IMAGES = 7
# Sync, rename and folder calls of a writer of two shards; fewer would mean that the hooks miss some.
COUNT_OF_KILLS = 60
IDENTITY: dict[str, Any] = {"teacher": {"sha256": "aa", "dtype": "fp32"}, "seed": 3}
DATA = {"images": [{"path": f"{i}.jpg"} for i in range(NUM_IMAGES)]}
ENVIRONMENT = {"host": "here"}
GIVEN: dict[str, Any] = {
    "teacher": {"sha256": "aa"},
    "head": HeadSpec((Tap("P3", 4, 8),), 16, ("cat", "dog")),
    "codec": {"fidelity": "exact"},
    "imgsz": 64,
    "seed": 3,
    "recipe": {"mosaic": 1.0},
    "environment": {"zarr": "3"},
}


def arrays() -> dict[str, np.ndarray]:
    return {"cv2.0.weight": np.arange(12, dtype="f4").reshape(3, 4), "scale": np.array(2.5, "f2")}


def row(column: Column, rng: np.random.Generator) -> np.ndarray:
    """Return a random row of `column`."""
    shape = (int(rng.integers(0, column.shape[0] + 1)),) if column.ragged else column.shape
    if np.dtype(column.dtype).kind == "f":
        return rng.normal(size=shape).astype(column.dtype)
    return rng.integers(0, 100, size=shape).astype(column.dtype)


def rows_of(columns: Sequence[Column], view: View, num_images: int = NUM_IMAGES) -> dict[str, list[np.ndarray]]:
    """Return the rows of all samples of `view`, always the same."""
    rng = np.random.default_rng([ord(view.kind[0]), view.number])
    return {column.name: [row(column, rng) for _ in range(num_images)] for column in columns}


def open_writer(path: Path, columns: tuple[Column, ...] = SMALL, **changes: Any) -> CacheWriter:
    given = {"identity": IDENTITY, "data": DATA, "num_images": NUM_IMAGES, "teacher_arrays": arrays(), **changes}
    return CacheWriter.open_or_create(path, columns=columns, **given)


def write_views(path: Path, *views: View, columns: tuple[Column, ...] = SMALL, **changes: Any) -> Manifest:
    """Write a complete cache of `views`, going on where an earlier call ended."""
    with open_writer(path, columns, **changes) as writer:
        for view in views:
            rows = rows_of(columns, view, writer.num_images)
            for shard in writer.units(view):
                if not writer.done(view, shard):
                    part = {name: [values[i] for i in writer.samples(shard)] for name, values in rows.items()}
                    writer.write_unit(view, shard, part, ENVIRONMENT)
        return writer.finish(views, GIVEN)
