"""What a packed view decodes to: PNG and labels to the bit, JPEG within its bound; nothing else decodes at all."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_kd.errors import DamagedCacheError, InputDataError, MismatchError, SettingError
from cache_kd.views import packing
from cache_kd.views.packing import (
    JpegPixels,
    PixelCodec,
    PngPixels,
    decode_labels,
    decoder_difference,
    describe_packing,
    encode_labels,
    packing_from_description,
    parse_packing,
)

CODECS = [JpegPixels(), JpegPixels(100), JpegPixels(60), JpegPixels(1), PngPixels()]
SIZES = st.sampled_from([32, 64, 96])
CONTENTS = ("noise", "extremes", "smooth", "constant", "edges")
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)


def picture(content: str, size: int, seed: int) -> np.ndarray:
    """Return (3, size, size) uint8 of one sort of content."""
    rng = np.random.default_rng(seed)
    if content == "noise":
        return rng.integers(0, 256, (3, size, size), dtype=np.uint8)
    if content == "extremes":  # the worst for a codec of differences: independent 0 and 255
        return (rng.integers(0, 2, (3, size, size)) * 255).astype(np.uint8)
    if content == "constant":
        return np.full((3, size, size), rng.integers(0, 256, (3, 1, 1)), np.uint8)
    y, x = np.mgrid[:size, :size] / size
    if content == "edges":
        return np.stack([(x > rng.random()), (y > rng.random()), (x + y > 1)]).astype(np.uint8) * 255
    waves = [np.sin(2 * np.pi * (rng.random() * x + rng.random() * y + rng.random())) for _ in range(3)]
    return (127.5 + 127 * np.stack(waves)).astype(np.uint8)


@every_codec
@settings(deadline=None, max_examples=25)
@given(content=st.sampled_from(CONTENTS), size=SIZES, seed=st.integers(0, 2**32))
def test_pixels_come_back_within_the_bound(codec: PixelCodec, content: str, size: int, seed: int) -> None:
    pixels = picture(content, size, seed)
    row = codec.encode(pixels)
    again = codec.decode(row, size)
    assert again.dtype == np.uint8 and again.shape == pixels.shape and again.flags.c_contiguous
    rms = np.sqrt(((again.astype(float) - pixels) ** 2).mean(axis=(1, 2)))
    assert (rms <= codec.rms_bound).all()
    assert row.dtype == np.uint8 and row.ndim == 1 and len(row) <= codec.capacity(size)
    assert np.array_equal(codec.encode(pixels), row)


@settings(deadline=None, max_examples=25)
@given(pixels=hnp.arrays(np.uint8, (3, 32, 32)))
def test_png_is_exact(pixels: np.ndarray) -> None:
    assert np.array_equal(PngPixels().decode(PngPixels().encode(pixels), 32), pixels)


def test_finer_quality_has_a_finer_bound_and_png_none() -> None:
    bounds = [JpegPixels(quality).rms_bound for quality in (10, 50, 95, 100)]
    assert bounds == sorted(bounds, reverse=True) and bounds[2] < 16
    assert PngPixels().rms_bound == 0


@pytest.mark.parametrize("codec", CODECS[:2] + CODECS[-1:], ids=lambda codec: codec.spec)
def test_colours_keep_their_places_and_their_resolution(codec: PixelCodec) -> None:
    pixels = np.zeros((3, 64, 64), np.uint8)
    pixels[0, :, ::2] = 255  # red stripes of one pixel: subsampled colours would blur them to pink
    again = codec.decode(codec.encode(pixels), 64).astype(int)
    assert np.abs(again - pixels).max() <= (0 if codec.spec == "png" else 12)


def test_jpeg_is_baseline_with_every_colour_value() -> None:
    row = JpegPixels().encode(picture("smooth", 64, 0))
    markers = dict(packing._segments(row))
    assert 0xC0 in markers and 0xC2 not in markers
    assert markers[0xC0][7::3].tolist() == [0x11] * 3  # sampling factors 1x1 of Y, Cb and Cr


@every_codec
@pytest.mark.parametrize(
    "row",
    [
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff\xc0\x00\x02",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a" + b"\0" * 40,
        b"\0" * 5000,
    ],
)
def test_other_bytes_are_refused(codec: PixelCodec, row: bytes) -> None:
    with pytest.raises(DamagedCacheError, match="packed pixels are no "):
        codec.decode(np.frombuffer(row, np.uint8), 64)


@pytest.mark.parametrize(("codec", "other"), [(JpegPixels(), PngPixels()), (PngPixels(), JpegPixels())])
def test_another_kind_of_image_is_refused(codec: PixelCodec, other: PixelCodec) -> None:
    with pytest.raises(DamagedCacheError, match=r"packed pixels are no (PNG|baseline JPEG) file"):
        codec.decode(other.encode(picture("smooth", 64, 0)), 64)


@pytest.mark.parametrize("codec", [JpegPixels(), PngPixels()], ids=lambda codec: codec.spec)
def test_another_size_is_refused_before_it_is_decoded(codec: PixelCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    row = codec.encode(picture("smooth", 96, 0))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DamagedCacheError, match=r"no (jpeg:95|png) image of 64 x 64 \(declared 96 x 96\)"):
        codec.decode(row, 64)


def test_a_broken_file_with_a_sound_header_is_refused() -> None:
    row = PngPixels().encode(picture("noise", 64, 0))
    with pytest.raises(DamagedCacheError, match="packed pixels are no png image"):
        PngPixels().decode(row[:60], 64)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JpegPixels, "capacity", lambda self, imgsz: 100)
    with pytest.raises(InputDataError, match=r"bytes as jpeg:95, a packed view holds at most 100; choose --pack png"):
        JpegPixels().encode(picture("smooth", 64, 0))


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 40), st.just(5)), elements=st.floats(width=32)))
def test_labels_come_back_to_the_bit(table: np.ndarray) -> None:
    row = encode_labels(table[:, :1], table[:, 1:])
    cls, boxes = decode_labels(row)
    assert cls.shape == (len(table), 1) and boxes.shape == (len(table), 4)
    assert cls.dtype == boxes.dtype == np.float32
    assert np.concatenate([cls, boxes], axis=1).tobytes() == table.tobytes()
    assert cls.flags.writeable and boxes.flags.writeable  # Ultralytics changes labels in place


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputDataError, match="8193 boxes, a packed view holds at most 8192; choose --pack none"):
        encode_labels(np.zeros(8193, np.float32), np.zeros((8193, 4), np.float32))
    with pytest.raises(DamagedCacheError, match="packed labels have 21 bytes, no multiple of 20"):
        decode_labels(np.zeros(21, np.uint8))


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("none", None),
        ("png", PngPixels()),
        ("jpeg", JpegPixels(95)),
        ("jpeg:95", JpegPixels(95)),
        ("jpeg:7", JpegPixels(7)),
    ],
)
def test_packing_is_named_and_described(text: str, codec: PixelCodec | None) -> None:
    assert parse_packing(text) == codec
    assert packing_from_description(describe_packing(codec)) == codec


@pytest.mark.parametrize(
    "text", ["", "jpg", "JPEG", "jpeg:", "jpeg:0", "jpeg:101", "jpeg:9.5", "jpeg:-1", "png:3", "webp"]
)
def test_other_packings_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"^--pack .*; allowed: none, jpeg, jpeg:QUALITY from 1 to 100, png$"):
        parse_packing(text)
    with pytest.raises(MismatchError, match=r"the manifest names the packing .*; known: none, jpeg"):
        packing_from_description({"spec": text})


def test_descriptions_name_the_encoder() -> None:
    assert describe_packing(None) == {"spec": "none"}
    said = JpegPixels(90).describe()
    assert said["sampling"] == "4:4:4" and said["encoder"].endswith(f"of OpenCV {cv2.__version__}")
    assert "unknown" not in said["encoder"] and "/" not in PngPixels().describe()["encoder"]
    assert JpegPixels(90).describe() != JpegPixels(91).describe()


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_difference_of_decoders_is_the_largest_of_all_pixels(levels: int) -> None:
    codec, pixels = JpegPixels(), picture("smooth", 64, 0)
    row = codec.encode(pixels)
    seen = codec.decode(row, 64)
    seen[1, 5, 7] += levels
    assert decoder_difference(codec, row, seen) == levels
