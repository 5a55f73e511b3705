"""A shard of packed views keeps to 128 samples and 128 MiB; one of replayed views is as it always was."""

from __future__ import annotations

import numpy as np
import pytest

from cache_kd.cache.layout import MAX_SAMPLES, MAX_SHARD_BYTES, shard_size
from cache_kd.codecs import ViewCodec
from cache_kd.pipeline.contents import stored_columns
from cache_kd.structures import HeadSpec, Tap
from cache_kd.views.packing import JpegPixels, PixelCodec, PngPixels

HEAD = HeadSpec((Tap("P3", 128, 8), Tap("P4", 256, 16), Tap("P5", 512, 32)), 16, ("cell",), hold=(128, 256, 512))
FEATURES = 128 * 160**2 + 256 * 80**2 + 512 * 40**2
"""Values of the maps of a view at 1280 pixels, of which fidelity safe keeps a byte each."""
EVERY = ("features", "logits")


@pytest.mark.parametrize(
    ("store", "packing", "pixel_bytes", "expected"),
    [
        (EVERY, None, 0, 23),
        (EVERY, JpegPixels(), 1280**2, 18),
        (EVERY, PngPixels(), 3 * 1280**2, 12),
        (("logits",), None, 0, MAX_SAMPLES),
        (("logits",), JpegPixels(100), 2 * 1280**2, 40),
        (("logits",), PngPixels(), 3 * 1280**2, 27),
    ],
)
def test_a_shard_at_1280_pixels(
    store: tuple[str, ...], packing: PixelCodec | None, pixel_bytes: int, expected: int
) -> None:
    samples = shard_size(stored_columns(ViewCodec.create("safe", HEAD, 1280, store), packing))
    assert samples == expected
    row = (FEATURES if "features" in store else 0) + pixel_bytes
    assert samples * row <= MAX_SHARD_BYTES and (samples == MAX_SAMPLES or (samples + 1) * row > 0.9 * MAX_SHARD_BYTES)


@pytest.mark.parametrize("codec", [JpegPixels(), JpegPixels(100), PngPixels()], ids=lambda codec: codec.spec)
def test_a_picture_with_much_detail_takes_what_is_expected(codec: PixelCodec) -> None:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(40, 216, (3, 20, 20)), np.ones((16, 16)))
    noisy = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    size = len(codec.encode(noisy))
    assert 0.4 * codec.expected(320) < size <= codec.expected(320) < codec.capacity(320)
