"""In: a data mapping, a recipe, a seed. Out: a data set whose item is a pure function of (view, index)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import Albumentations, Compose, Mosaic
from ultralytics.data.utils import img2label_paths
from ultralytics.utils.ops import xywh2xyxy

from cache_kd.errors import InputDataError, SettingError
from cache_kd.fingerprint import SourceImage, scan_sources
from cache_kd.structures import View, ViewSample
from cache_kd.ultralytics_bridge.scan import ScannedDataset, printable
from cache_kd.views.packing import LABELS, PIXELS, PixelCodec, encode_labels
from cache_kd.views.recipe import Recipe
from cache_kd.views.seeding import item_seed, random_scope

DECODED_BYTES = 512 << 20
"""Default bound on decoded source images kept in memory by one process; it never changes what an item is."""

MESSAGE = 600
"""Most characters of an error of Ultralytics' that are shown: it may list every image."""


class ViewDataset(ScannedDataset):
    """Ultralytics' training data set with its randomness owned by (seed, view, index).

    Differences to the stock set, none of which depends on workers, batch size, order or process:
    mosaic partners are drawn uniformly over all images (the stock rule of `cache=ram`) instead of from a buffer of
    recent loads; what `ScannedDataset` says of files beside the images.
    """

    def __init__(
        self,
        data: dict[str, Any],
        *,
        recipe: Recipe,
        imgsz: int,
        seed: int,
        stride: int = 32,
        decoded_bytes: int = DECODED_BYTES,
        packing: PixelCodec | None = None,
    ) -> None:
        self.recipe, self.seed, self.packing = recipe, seed, packing
        settings = recipe.to_json()
        try:
            hyp = get_cfg(overrides={key: value for key, value in settings.items() if value is not None})
        except (SyntaxError, TypeError, ValueError) as error:
            raise SettingError(f"augmentation: {' '.join(str(error).split())}") from None
        try:
            super().__init__(
                img_path=data["train"],
                data=data,
                task="detect",
                imgsz=imgsz,
                augment=True,
                hyp=hyp,
                batch_size=1,
                stride=stride,
                pad=0.0,
                single_cls=bool(settings["single_cls"]),
                classes=settings["classes"],
                fraction=settings["fraction"] if settings["fraction"] is not None else 1.0,
            )
        except InputDataError:
            raise
        except (FileNotFoundError, RuntimeError, ValueError, AssertionError) as error:
            text = " ".join(str(error).split())  # of every image where none can be used
            shown = text if len(text) <= MESSAGE else f"{text[:MESSAGE]} …"
            raise InputDataError(f"{data['train']}: {shown}") from error
        self.decoded = DecodedImages(decoded_bytes)
        self._pipelines = {kind: self._pipeline(View(kind, 0)) for kind in ("mixed", "plain")}

    # -- what is loaded ---------------------------------------------------------------------------------------------

    def sources(self) -> tuple[SourceImage, ...]:
        """Return name and content hashes of every usable image and its label, in the order of indices."""
        files = [label["im_file"] for label in self.labels]
        # Not `label_files`, which still lists those of images that were skipped.
        return scan_sources(files, img2label_paths(files))

    def image_name(self, index: int) -> str:
        """Return the file name of image `index`, for messages."""
        return printable(Path(self.labels[index]["im_file"]).name)

    def load_image(
        self, i: int, rect_mode: bool = True, resize_short: bool = False
    ) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Return a private copy of image i, decoded and resized: colour augmentation writes into it in place."""
        held = self.decoded.get(i)
        if held is None:
            held = super().load_image(i, rect_mode, resize_short)
            self.ims[i] = None  # the stock set keeps recent loads; ours are kept, bounded, in `decoded`
            self.buffer.clear()
            self.decoded.put(i, held)
        image, original, resized = held
        return image.copy(), original, resized

    # -- views ------------------------------------------------------------------------------------------------------

    def build_transforms(self, hyp: Any) -> Compose:
        """Return the stock pipeline with the mosaic's buffer off wherever a Mosaic is nested."""
        transforms = super().build_transforms(hyp)
        for transform in _walk(transforms):
            if isinstance(transform, Mosaic):
                transform.buffer_enabled = False
        return transforms

    def _pipeline(self, view: View) -> tuple[Compose, list[Any]]:
        settings = {key: value for key, value in self.recipe.for_view(view).items() if value is not None}
        transforms = self.build_transforms(get_cfg(overrides=settings))
        own_streams = [
            transform.transform
            for transform in _walk(transforms)
            if isinstance(transform, Albumentations) and hasattr(transform.transform, "set_random_seed")
        ]
        return transforms, own_streams

    def item(self, view: View, index: int) -> dict[str, Any]:
        """Return Ultralytics' item of one view: `img` (3, H, W) uint8 RGB, `cls`, `bboxes` xywh in [0, 1], ….

        Raises:
            InputDataError: The image file cannot be read any more.
        """
        transforms, own_streams = self._pipelines[view.kind]
        with random_scope(item_seed(self.seed, view, index)) as narrow_seed:
            for stream in own_streams:
                stream.set_random_seed(narrow_seed)
            try:
                item: dict[str, Any] = transforms(self.get_image_and_label(index))
            except FileNotFoundError as error:
                raise InputDataError(f"view {view.name}, item {index}: {error}") from None
        return item

    def sample(self, view: View, index: int) -> ViewSample:
        """Return pixels, classes and boxes (xyxy, pixels of the view) of one view.

        With a packing these are the pixels that its bytes decode to, and the bytes stand beside them.

        Raises:
            InputDataError: The image file cannot be read any more, or the view cannot be packed.
        """
        item = self.item(view, index)
        if self.packing is None:
            return view_sample(item)
        try:
            row = self.packing.encode(item["img"].numpy())
            labels = encode_labels(item["cls"].numpy(), item["bboxes"].numpy())
        except InputDataError as error:
            name = self.image_name(index)
            raise InputDataError(f"view {view.name}, item {index} ({name}) cannot be packed: {error}") from error
        item["img"] = torch.from_numpy(self.packing.decode(row, self.imgsz))
        return view_sample(item, packed={PIXELS: row, LABELS: labels})

    def __getitem__(self, key: tuple[View, int]) -> ViewSample:  # the extraction's loader asks by (view, index)
        return self.sample(*key)


def view_sample(item: Mapping[str, Any], packed: Mapping[str, np.ndarray] | None = None) -> ViewSample:
    """Return an item of Ultralytics' (boxes xywh as shares of the view's size) as the teacher takes it."""
    pixels = item["img"].numpy()
    height, width = pixels.shape[1:]
    boxes = xywh2xyxy(item["bboxes"].numpy().reshape(-1, 4).astype(np.float32))
    scale = np.array([width, height, width, height], dtype=np.float32)
    return ViewSample(pixels, item["cls"].numpy().reshape(-1).astype(np.int64), boxes * scale, packed or {})


class DecodedImages:
    """Decoded source images, least recently used first out, bounded by bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._images: OrderedDict[int, tuple[np.ndarray, tuple[int, int], tuple[int, int]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._images)

    def __reduce__(self) -> tuple[type[DecodedImages], tuple[int]]:
        return DecodedImages, (self.limit,)  # sent to another process, a data set reads its images there

    def get(self, index: int) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]] | None:
        found = self._images.get(index)
        if found is not None:
            self._images.move_to_end(index)
        return found

    def put(self, index: int, image: tuple[np.ndarray, tuple[int, int], tuple[int, int]]) -> None:
        if image[0].nbytes > self.limit:
            return
        self._images[index] = image
        self.held += image[0].nbytes
        while self.held > self.limit:
            _, (oldest, _, _) = self._images.popitem(last=False)
            self.held -= oldest.nbytes


def _walk(transform: Any) -> Iterator[Any]:
    """Yield every transform reachable from a pipeline, nested pre-transforms included."""
    seen: set[int] = set()
    todo = [transform]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        todo += list(getattr(current, "transforms", None) or [])
        todo.append(getattr(current, "pre_transform", None))
