"""In: a packed cache, or the data set to make one of. Out: its views, after a proof that they decode as they did."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cache_kd.cache.reader import CacheReader
from cache_kd.errors import DamagedCacheError, MismatchError
from cache_kd.fingerprint import listed
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.packed import BOXES, COUNTS, SHAPES, PackedImages, PackedViews, image_arrays
from cache_kd.views.packing import MAX_DIFFERENCE, PIXELS, PixelCodec, decoder_difference

LOG = logging.getLogger(__name__)
PROBE, PROBE_PIXELS = "packed.probe", "packed.probe_pixels"
ARRAYS = (COUNTS, BOXES, SHAPES, PROBE, PROBE_PIXELS)
"""Arrays that a packed cache has beside the teacher's: its source images, and one view packed and as it was decoded."""


def packed_arrays(dataset: ViewDataset) -> dict[str, np.ndarray]:
    """Return `ARRAYS` of a data set that packs its views, none of one that does not.

    The probe is the same whatever views are extracted: the first image of the first mixed view.
    """
    if dataset.packing is None:
        return {}
    probe = dataset.sample(View("mixed", 0), 0)
    return {**image_arrays(dataset), PROBE: probe.packed[PIXELS], PROBE_PIXELS: probe.pixels}


def packed_views(reader: CacheReader, codec: PixelCodec, names: Sequence[str]) -> PackedViews:
    """Return the views of a packed cache whose images have these names."""
    arrays = {name: reader.read_teacher(name) for name in (COUNTS, BOXES, SHAPES)}
    return PackedViews(reader, codec, reader.manifest.imgsz, PackedImages.from_arrays(names, arrays))


def check_decoder(reader: CacheReader, codec: PixelCodec) -> int:
    """Return by how many levels at most this machine decodes the cache's probe to other pixels; warns if it is not 0.

    Raises:
        MismatchError: by more than `MAX_DIFFERENCE`. DamagedCacheError: the probe is no view of this cache.
    """
    pixels, imgsz = reader.read_teacher(PROBE_PIXELS), reader.manifest.imgsz
    if pixels.shape != (3, imgsz, imgsz) or pixels.dtype != np.uint8:
        raise DamagedCacheError(
            f"{reader.path}: array {PROBE_PIXELS} is no view of {imgsz} px; extract the cache again"
        )
    difference = decoder_difference(codec, reader.read_teacher(PROBE), pixels)
    if not difference:
        return 0
    there = reader.manifest.codec["pack"].get("encoder", "another library")
    says = (
        f"{reader.path}: this machine decodes the packed pixels ({codec.spec}, by {there}) to others than the teacher "
        f"saw, up to {difference} of 255 levels off"
    )
    if difference > MAX_DIFFERENCE:
        versions = reader.manifest.identity["versions"]
        raise MismatchError(
            f"{says}; allowed: {MAX_DIFFERENCE}; install the extraction's: pip install "
            f"opencv-python=={versions.get('opencv-python')}"
        )
    LOG.warning("%s; hashes of pixels are not compared, the checksums of the stored bytes are", says)
    return difference


def decoder_change(reader: CacheReader, codec: PixelCodec) -> np.ndarray:
    """Return (3, H, W) int16: this machine's pixels of the probe minus those that the teacher saw."""
    pixels = codec.decode(reader.read_teacher(PROBE), reader.manifest.imgsz)
    return np.asarray(pixels.astype(np.int16) - reader.read_teacher(PROBE_PIXELS))


def check_class_names(teacher: Mapping[str, Any], data: Mapping[str, Any], path: object) -> None:
    """Raise `MismatchError` unless a data file has the classes, in their order, by which packed labels are counted."""
    recorded = teacher.get("data_names")
    found = [str(data["names"][index]) for index in range(data["nc"])]
    if recorded != found:
        raise MismatchError(
            f"{path}: `names:` are {listed(found)}; the labels in the packed cache were written with "
            f"{listed(recorded or ['unknown names'])}; give those, in this order"
        )
