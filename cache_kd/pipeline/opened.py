"""In: a cache's place. Out: its targets and pixels by view and index, in memory and typed."""

from __future__ import annotations

import shlex
from functools import cached_property
from pathlib import Path

import numpy as np

from cache_kd.cache.manifest import Manifest
from cache_kd.cache.places import open_store
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.store import Place, Store
from cache_kd.codecs import ViewCodec
from cache_kd.fingerprint import SourceImage, compare_sources
from cache_kd.pipeline.contents import check_contents, checked_codecs, checked_images
from cache_kd.pipeline.locations import newest_cache
from cache_kd.pipeline.packed import ARRAYS, packed_views
from cache_kd.structures import FrozenHead, Targets, View
from cache_kd.ultralytics_bridge.data import find_data_file, load_data
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.frozen_head import FrozenDetectHead
from cache_kd.ultralytics_bridge.heads import rebuild_head
from cache_kd.ultralytics_bridge.packed import PackedViews
from cache_kd.views.packing import PixelCodec
from cache_kd.views.recipe import Recipe


class Cache:
    """A complete cache, opened for reading.

    Args:
        path: Its folder, or its URL in an object store; a `Store` says more of how it is read.
        data: The data file, for pixels only; by default the one that the extraction used, looked up as recorded, beside
            the cache, and in the working directory.
    """

    def __init__(self, path: Place | str | Store, *, data: Path | str | None = None) -> None:
        store = open_store(path)
        self.path: Place = store.place
        self.reader = CacheReader(store)
        check_contents(self.reader.manifest, self.path)
        self._data = Path(data) if data is not None else None

    @property
    def manifest(self) -> Manifest:
        """What the cache holds and what it was made from."""
        return self.reader.manifest

    @property
    def views(self) -> tuple[View, ...]:
        """The views, mixed ones first."""
        return self.manifest.views

    @cached_property
    def images(self) -> tuple[SourceImage, ...]:
        """The ordered images: relative path, bytes, content hashes of image and label."""
        return checked_images(self.reader.read_data(), self.manifest.num_images, self.path)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards of all views."""
        return self.reader.num_bytes

    @cached_property
    def _codecs(self) -> tuple[ViewCodec, PixelCodec | None]:
        return checked_codecs(self.manifest, self.path)

    @property
    def codec(self) -> ViewCodec:
        """How its columns become targets."""
        return self._codecs[0]

    @property
    def packing(self) -> PixelCodec | None:
        """How it keeps the views themselves; None where they are made again from the source images."""
        return self._codecs[1]

    def frozen_head(self) -> FrozenHead:
        """Return the teacher's head, rebuilt from the arrays that the cache holds.

        Raises:
            MismatchError: The head is not one of Ultralytics' own.
        """
        arrays = {name: self.reader.read_teacher(name) for name in self.manifest.arrays if name not in ARRAYS}
        return FrozenDetectHead(rebuild_head(self.manifest.head, self.manifest.teacher["head"], arrays))

    def read(self, view: int, index: int, *, plain: bool = False) -> Targets:
        """Return all targets of one view of one image as float32 numpy arrays.

        Raises:
            SettingError, DamagedCacheError: No such view or image; a file is missing or damaged.
        """
        chosen = View("plain" if plain else "mixed", view)
        row = self.reader.read(chosen, index, tuple(column.name for column in self.codec.columns))
        batch = self.codec.decode_one(row)
        return Targets(
            features=tuple(level[0].numpy() for level in batch.features) if batch.features is not None else None,
            scores=batch.scores[0].numpy() if batch.scores is not None else None,
            boxes=batch.boxes[0].numpy() if batch.boxes is not None else None,
            sent=batch.sent[0].numpy() if batch.sent is not None else None,
            pixel_hash=self.reader.read_row(chosen, "pixel_hash", index).tobytes(),
            layers={name: level[0].numpy() for name, level in batch.layers.items()},
        )

    def pixels(self, view: int, index: int, *, plain: bool = False) -> np.ndarray:
        """Return the network's input of one view: (3, H, W) uint8 RGB, from the cache if packed, else from the images.

        Raises:
            SettingError: No such view or image. DamagedCacheError: Packed pixels are damaged.
            MissingFileError, MismatchError: The data set is not found, or is not the one that the teacher saw.
        """
        chosen = View("plain" if plain else "mixed", view)
        self.reader.read(chosen, index, ("pixel_hash",))  # refuses a view or index that the cache does not hold
        return self.dataset.sample(chosen, index).pixels

    @cached_property
    def packed(self) -> PackedViews | None:
        """The views that the cache keeps; None where it keeps none."""
        if self.packing is None:
            return None
        return packed_views(self.reader, self.packing, [image.path for image in self.images])

    @cached_property
    def dataset(self) -> ViewDataset | PackedViews:
        """The views: those that the cache keeps, else the data set they are made of, checked to be the teacher's."""
        manifest = self.manifest
        if self.packed is not None:
            return self.packed
        dataset = ViewDataset(
            load_data(self.data_file()),
            recipe=Recipe.from_settings(manifest.recipe),
            imgsz=manifest.imgsz,
            seed=manifest.seed,
        )
        compare_sources(self.images, dataset.sources())
        return dataset

    def data_file(self) -> Path:
        """Return the data file: the one given, else the recorded one, found."""
        if self._data is not None:
            return self._data
        return recorded_data_file(self.path, self.manifest)


def recorded_data_file(path: Place, manifest: Manifest) -> Path:
    """Return the data file that the extraction used: as recorded, beside the cache, or in the working directory."""
    beside = (path.parent, path.parent.parent) if isinstance(path, Path) else ()
    return find_data_file(str(manifest.teacher["data"]), beside=beside, purpose=f"cache {path}")


def open_cache(path: Place | str | None = None, *, data: Path | str | None = None) -> Cache:
    """Return the cache at `path`, a folder or a URL, or the newest complete one of the default place."""
    return Cache(path if path is not None else newest_cache()[0], data=data)


def extract_command(manifest: Manifest) -> str:
    """Return the command that extracts a cache like this one again, without --store and --taps."""
    teacher, kinds = manifest.teacher, [view.kind for view in manifest.views]
    options: dict[str, object] = {
        "teacher": teacher["file"],
        "data": teacher["data"],
        "imgsz": manifest.imgsz,
        "views": kinds.count("mixed"),
        "plain-views": kinds.count("plain"),
        "seed": manifest.seed,
        "fidelity": manifest.codec["fidelity"],
        "pack": manifest.codec["pack"]["spec"],
        "precision": manifest.environment["precision"],
    }
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items()]
    augment = [shlex.quote(f"{key}={value}") for key, value in teacher["augment"].items()]
    return " ".join(["cache-kd extract", *words, *augment])
