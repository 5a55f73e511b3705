"""In: the rows of a packed cache. Out: Ultralytics' training items of its views, without images or label files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from ultralytics.data.dataset import YOLODataset

from cache_kd.errors import DamagedCacheError
from cache_kd.structures import View, ViewSample
from cache_kd.ultralytics_bridge.dataset import ViewDataset, view_sample
from cache_kd.views.packing import LABELS, PIXELS, PixelCodec, decode_labels

COUNTS, BOXES, SHAPES = "packed.counts", "packed.boxes", "packed.shapes"
"""Arrays of a packed cache about its source images: boxes an image, all boxes (class, x, y, w, h), (H, W)."""


class RowReader(Protocol):
    """Stored rows by view, index and column (a `CacheReader`)."""

    def read(self, view: View, index: int, columns: tuple[str, ...]) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class PackedImages:
    """What a packed cache says of its source images.

    Attributes:
        names: relative path of each. shapes: (N, 2), height and width. counts: (N,) labelled boxes.
        boxes: (M, 5) float32 of all images in a row: class, then xywh as shares of the image's size.
    """

    names: Sequence[str]
    shapes: np.ndarray
    counts: np.ndarray
    boxes: np.ndarray

    @classmethod
    def from_arrays(cls, names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> PackedImages:
        """Return them from the cache's arrays; raises `DamagedCacheError` unless they fit each other."""
        shapes, counts, boxes = arrays[SHAPES], arrays[COUNTS], arrays[BOXES]
        fits = shapes.shape == (len(names), 2) and counts.shape == (len(names),) and boxes.shape[1:] == (5,)
        if not fits or max(int(counts.sum()), 1) != len(boxes):
            raise DamagedCacheError(
                f"the arrays packed.* describe {len(counts)} images with {counts.sum()} boxes in {len(boxes)} rows, "
                f"the cache lists {len(names)} images; run cache-kd verify"
            )
        return cls(names, shapes, counts, boxes)


def image_arrays(dataset: ViewDataset) -> dict[str, np.ndarray]:
    """Return the arrays from which `PackedImages` are made again; one row of zeros where no image has a box."""
    tables = [np.concatenate([label["cls"], label["bboxes"]], axis=1) for label in dataset.labels]
    boxes = np.concatenate(tables).astype(np.float32)
    return {
        COUNTS: np.array([len(table) for table in tables], np.uint32),
        BOXES: boxes if len(boxes) else np.zeros((1, 5), np.float32),
        SHAPES: np.array([label["shape"] for label in dataset.labels], np.int32),
    }


class PackedViews:
    """The views of a packed cache, as `ViewDataset` gives them: one decoded image each, nothing is augmented."""

    collate_fn = staticmethod(YOLODataset.collate_fn)

    def __init__(self, reader: RowReader, codec: PixelCodec, imgsz: int, images: PackedImages) -> None:
        self.reader, self.codec, self.imgsz, self.images = reader, codec, imgsz, images

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "labels"}  # of use to the trainer only

    def __len__(self) -> int:
        return len(self.images.names)

    def image_name(self, index: int) -> str:
        """Return the path of image `index` below the folder of the data set that it was made of."""
        return self.images.names[index]

    @cached_property
    def labels(self) -> list[dict[str, Any]]:
        """The labels of the source images by Ultralytics' names: for its plots, class weights and `max_det`."""
        tables = np.split(self.images.boxes, np.cumsum(self.images.counts))[: len(self)]
        return [
            {
                "im_file": name,
                "shape": tuple(shape),
                "cls": table[:, :1],
                "bboxes": table[:, 1:],
                "normalized": True,
                "bbox_format": "xywh",
            }
            for name, shape, table in zip(self.images.names, self.images.shapes.tolist(), tables, strict=True)
        ]

    def item(self, view: View, index: int) -> dict[str, Any]:
        """Return Ultralytics' item of one view, as `ViewDataset.item` does but for `ratio_pad`, which nobody reads.

        Raises:
            DamagedCacheError: a file is gone or fails its checks, or a row is no packed view.
        """
        row = self.reader.read(view, index, (PIXELS, LABELS))
        try:
            pixels = self.codec.decode(row[PIXELS], self.imgsz)
            cls, boxes = decode_labels(row[LABELS])
        except DamagedCacheError as error:
            raise DamagedCacheError(
                f"view {view.name}, item {index} ({self.image_name(index)}): {error}; run cache-kd verify"
            ) from error
        return {
            "im_file": self.image_name(index),
            "ori_shape": tuple(self.images.shapes[index].tolist()),
            "resized_shape": (self.imgsz, self.imgsz),
            "img": torch.from_numpy(pixels),
            "cls": torch.from_numpy(cls),
            "bboxes": torch.from_numpy(boxes),
            "batch_idx": torch.zeros(len(boxes)),
        }

    def sample(self, view: View, index: int) -> ViewSample:
        """Return pixels, classes and boxes (xyxy, pixels of the view) of one view."""
        return view_sample(self.item(view, index))
