"""In: numbers of images and views. Out: a cache of that size as the program would write it, but for the shards' rows.

What stands in its lists (sizes, hashes) is made up; every file but the shards is written by the program's own code, and
what reads them cannot tell the difference until it opens a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cache_kd.cache.files import seal, sha256
from cache_kd.cache.layout import FORMAT, ArrayLayout, layouts, teacher_path
from cache_kd.cache.manifest import Manifest, columns_to_json, content_digest
from cache_kd.cache.records import FileEntry, UnitRecord, record_path, shards_json, shards_path
from cache_kd.cache.writer import CacheWriter
from cache_kd.codecs import ViewCodec
from cache_kd.fingerprint import SourceImage, digest_json, digest_sources
from cache_kd.pipeline.contents import stored_columns
from cache_kd.pipeline.identity import codec_record
from cache_kd.pipeline.versions import PIXEL_PACKAGES, environment, package_versions
from cache_kd.structures import HeadSpec, Tap, View
from cache_kd.views.recipe import Recipe

TAPS = (Tap("model.15", 128, 8), Tap("model.18", 256, 16), Tap("model.21", 512, 32))
HOLD = (128, 256, 512, *([64] * 2 + [128] * 2) * 3)
ARRAYS = {"cv2.0.0.conv.weight": np.zeros((64, 128, 3, 3), "f4")}
SECONDS = {"views": 3.1, "teacher": 9.2, "forward": 8.4, "encode": 2.2, "write": 0.7}


def head(classes: int = 80) -> HeadSpec:
    """Return what a YOLOv8s of so many classes says of its head."""
    return HeadSpec(TAPS, 16, tuple(f"class {number}" for number in range(classes)), hold=HOLD)


@dataclass(frozen=True)
class SyntheticCache:
    """A cache of `images` images and `views` mixed views at `imgsz` pixels, of a YOLOv8s with 80 classes."""

    path: Path
    images: int
    views: int
    imgsz: int = 640
    fidelity: str = "default"
    folder: str = "patch"

    @cached_property
    def codec(self) -> ViewCodec:
        return ViewCodec.create(self.fidelity, head(), self.imgsz, ("features", "logits"))

    @cached_property
    def sources(self) -> tuple[SourceImage, ...]:
        """Images as a data set of a million has them: folders of a thousand, names of twelve digits."""
        return tuple(
            SourceImage(f"{self.folder}{number // 1000}/{number:012d}.jpg", 90_000 + number % 70_000, _hex(number, 16),
                        _hex(-number - 1, 16))
            for number in range(self.images)
        )  # fmt: skip

    @cached_property
    def data(self) -> dict[str, Any]:
        return {"images": [source.to_json() for source in self.sources], "skipped": []}

    @cached_property
    def identity(self) -> dict[str, Any]:
        return {
            "teacher": {"weights": _hex(0, 32), "structure": _hex(1, 32), "names": list(head().names),
                        "strides": [tap.stride for tap in TAPS]},
            "data": digest_sources(self.sources),
            "recipe": Recipe.from_settings({}).to_json(),
            "imgsz": self.imgsz,
            "seed": 0,
            "codec": codec_record(self.codec, None),
            "precision": "fp32",
            "versions": package_versions(PIXEL_PACKAGES),
        }  # fmt: skip

    @property
    def given(self) -> dict[str, Any]:
        """What an extraction gives its writer for the manifest."""
        teacher = {"file": "best.pt", "file_sha256": _hex(2, 32), "weights_sha256": _hex(0, 32), "data": "data.yaml",
                   "augment": {}, "data_names": list(head().names),
                   "head": {"type": "Detect", "legacy": False, "norm_eps": 0.001, "activation": "SiLU"}}  # fmt: skip
        return {
            "teacher": teacher, "head": head(), "codec": codec_record(self.codec, None), "imgsz": self.imgsz,
            "seed": 0, "recipe": Recipe.from_settings({}).to_json(), "environment": self.environment,
        }  # fmt: skip

    @cached_property
    def environment(self) -> dict[str, Any]:
        return environment(device="cpu", batch=16, precision="fp32")

    @cached_property
    def view_list(self) -> tuple[View, ...]:
        return tuple(View("mixed", number) for number in range(self.views))

    def open_writer(self) -> CacheWriter:
        """Return the program's writer of this cache, which begins it, or finds it begun."""
        return CacheWriter.open_or_create(
            self.path,
            identity=self.identity,
            data=self.data,
            columns=stored_columns(self.codec, None),
            num_images=self.images,
            teacher_arrays=ARRAYS,
        )

    def write(self) -> Manifest:
        """Write everything but shards and unit records: the start, the list of files of each view, the manifest."""
        with self.open_writer() as writer:
            samples = writer.shard_size
        columns = stored_columns(self.codec, None)
        every = layouts(columns, self.images, samples)
        shards: dict[str, str] = {}
        files: list[tuple[str, str]] = []
        for view in self.view_list:
            entries = [entry for shard in range(-(-self.images // samples)) for entry in _entries(every, view, shard)]
            files += [(entry.path, entry.sha256) for entry in entries]
            content = shards_json(view, entries)
            target = self.path / shards_path(view)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            shards[view.name] = sha256(content)
        plain = {
            **self.given, "head": head().to_json(), "format": FORMAT, "identity": self.identity,
            "identity_digest": digest_json(self.identity), "columns": columns_to_json(columns),
            "arrays": {name: self._array(name, array) for name, array in ARRAYS.items()},
            "num_images": self.images, "shard_size": samples, "views": [view.name for view in self.view_list],
            "data_sha256": sha256((self.path / "data.json").read_bytes()), "shards": shards,
            "digest": content_digest(self.identity, files),
        }  # fmt: skip
        manifest = Manifest.from_json(plain)
        (self.path / "manifest.json").write_bytes(seal(manifest.to_json()))
        return manifest

    def _array(self, name: str, array: np.ndarray) -> dict[str, Any]:
        content = (self.path / teacher_path(name, array.ndim)).read_bytes()
        return {"dtype": array.dtype.str[1:], "shape": list(array.shape), "sha256": sha256(content)}

    def write_records(self, views: int, *, files: bool) -> int:
        """Write the records of all units of the first `views` views, with `files` empty shards too; returns how many.

        The shards have the sizes that their records say, without taking that room on the disk.
        """
        with self.open_writer() as writer:
            samples = writer.shard_size
        every = layouts(stored_columns(self.codec, None), self.images, samples)
        (self.path / "units").mkdir(exist_ok=True)
        count = 0
        for view in self.view_list[:views]:
            for shard in range(-(-self.images // samples)):
                entries = tuple(_entries(every, view, shard))
                record = UnitRecord(view, shard, 1, self.environment, entries, SECONDS)
                (self.path / record_path(view, shard)).write_bytes(record.content())
                for entry in entries if files else ():
                    target = self.path / entry.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        file.truncate(entry.bytes)
                count += 1
        return count


def _entries(every: dict[str, ArrayLayout], view: View, shard: int) -> Iterator[FileEntry]:
    """Yield the files of a unit; rows that are not small are taken to compress to a third."""
    for number, layout in enumerate(every.values()):
        size = layout.index_bytes + layout.rows(shard) * min(layout.column.row_bytes, 250_000 + shard)
        key = (view.number * len(every) + number) * layout.num_shards + shard
        yield FileEntry(layout.shard_path(view, shard), size, _hex(key, 32), _hex(key, 4))


def _hex(number: int, size: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=size).hexdigest()
