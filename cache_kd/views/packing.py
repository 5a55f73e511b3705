"""In: a view's pixels and labels. Out: the rows that a packed cache keeps of them; and back, the same for everyone."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import cv2
import numpy as np

from cache_kd.errors import DamagedCacheError, InputDataError, MismatchError, SettingError
from cache_kd.structures import Column

PIXELS, LABELS = "pixels", "labels"
ALLOWED = "none, jpeg, jpeg:QUALITY from 1 to 100, png"
MAX_BOXES = 8192
"""Most labelled boxes of one packed view: eight images (mosaic and mixup) of a thousand boxes each."""

MAX_DIFFERENCE = 2
"""Largest difference, in levels, between two decoders of the same bytes under which a student may be trained."""

_BOX = np.dtype([("cls", "<f4"), ("xywh", "<f4", (4,))])
_HEADERS = 4096
_START_OF_FRAME, _TABLES, _START_OF_SCAN = 0xC0, 0xDB, 0xDA


class PixelCodec(ABC):
    """(3, H, W) uint8 RGB ↔ the bytes of one image file, H = W = imgsz."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The codec as `--pack` names it, with every parameter."""

    @property
    @abstractmethod
    def rms_bound(self) -> float:
        """Largest root mean square error of a colour over a view, in levels of 0..255; 0 for a lossless codec."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what identity and manifest record, enough for `from_description`."""

    @abstractmethod
    def capacity(self, imgsz: int) -> int:
        """Return the most bytes that a view may take."""

    @abstractmethod
    def expected(self, imgsz: int) -> int:
        """Return the bytes that hardly a photograph takes more of; shards are cut by it."""

    @abstractmethod
    def _file(self, bgr: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def _size(self, data: np.ndarray) -> tuple[int, int]:
        """Return (H, W) as the file's header declares them; raises `DamagedCacheError` if it is no such file."""

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Return the bytes (u8, one axis) of pixels (3, H, W) uint8 RGB.

        Raises:
            InputDataError: they are more than `capacity`, which no photograph reaches.
        """
        row = self._file(np.ascontiguousarray(pixels[::-1].transpose(1, 2, 0))).reshape(-1)
        if len(row) > (most := self.capacity(pixels.shape[1])):
            raise InputDataError(
                f"{len(row)} bytes as {self.spec}, a packed view holds at most {most}; choose --pack png or none"
            )
        return row

    def decode(self, row: np.ndarray, imgsz: int) -> np.ndarray:
        """Return the (3, imgsz, imgsz) uint8 RGB pixels in `row`.

        Raises:
            DamagedCacheError: not such a file, or of another size, which is looked at before anything is decoded.
        """
        size = self._size(row)
        image = cv2.imdecode(row, cv2.IMREAD_COLOR) if size == (imgsz, imgsz) else None
        if image is None or image.shape != (imgsz, imgsz, 3):
            raise DamagedCacheError(
                f"packed pixels are no {self.spec} image of {imgsz} x {imgsz} (declared {size[0]} x {size[1]})"
            )
        pixels = np.empty((3, imgsz, imgsz), dtype=np.uint8)
        cv2.split(image, [*pixels[::-1]])  # BGR to RGB planes, written in place: a fifth of the time of NumPy's copy
        return pixels

    def columns(self, imgsz: int) -> tuple[Column, ...]:
        """Return the columns of a packed view."""
        room, expected = self.capacity(imgsz), self.expected(imgsz)
        pixels = Column(PIXELS, "u1", (room,), ragged=True, compressor="lz4", expected=expected)
        return (pixels, Column(LABELS, "u1", (MAX_BOXES * _BOX.itemsize,), ragged=True))


@final
@dataclass(frozen=True)
class JpegPixels(PixelCodec):
    """Baseline JPEG with a colour value a pixel (4:4:4), standard Huffman tables.

    Decoders differ most in how they enlarge subsampled colours; at 4:4:4 there is nothing to enlarge.
    """

    quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise SettingError(f"--pack jpeg:{self.quality}; allowed: {ALLOWED}")

    @property
    def spec(self) -> str:
        return f"jpeg:{self.quality}"

    @property
    def rms_bound(self) -> float:
        """By Parseval's theorem: each coefficient is off by half its step at most; then YCbCr to RGB, and roundings."""
        blank = self._file(np.zeros((8, 8, 3), np.uint8)).reshape(-1)
        tables = [segment for marker, segment in _segments(blank) if marker == _TABLES]
        # One segment may hold several tables, each after a byte that numbers it.
        steps = np.concatenate([segment.reshape(-1, 65)[:, 1:] for segment in tables]).astype(float)
        luma, chroma = (math.sqrt(float((table**2).mean())) / 2 + 1 for table in steps[:2])
        return luma + 1.772 * chroma + 1

    def describe(self) -> dict[str, Any]:
        return {"spec": self.spec, "sampling": "4:4:4", "encoder": _encoder("JPEG")}

    def capacity(self, imgsz: int) -> int:
        # Independent noise of 0 and 255 in every colour, the worst there is, takes 2.9 bytes a pixel at quality 95 and
        # 4.8 at 100; photographs take about half a byte. Room costs reading time, as it has to be inflated.
        return (3 if self.quality <= 95 else 5) * imgsz**2 + _HEADERS

    def expected(self, imgsz: int) -> int:
        # Means of bccd and coco128, 160 to 1280 px: .15 to .71 bytes a pixel at quality 95, .46 to 1.5 at 100.
        return (1 if self.quality <= 95 else 2) * imgsz**2

    def _file(self, bgr: np.ndarray) -> np.ndarray:
        return _encoded(
            ".jpg",
            bgr,
            {
                cv2.IMWRITE_JPEG_QUALITY: self.quality,
                cv2.IMWRITE_JPEG_SAMPLING_FACTOR: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
                cv2.IMWRITE_JPEG_OPTIMIZE: 0,
                cv2.IMWRITE_JPEG_PROGRESSIVE: 0,
            },
        )

    def _size(self, data: np.ndarray) -> tuple[int, int]:
        for marker, segment in _segments(data):
            if marker == _START_OF_FRAME and len(segment) >= 5:
                return int.from_bytes(segment[1:3].tobytes(), "big"), int.from_bytes(segment[3:5].tobytes(), "big")
        raise DamagedCacheError("packed pixels are no baseline JPEG file")


@final
@dataclass(frozen=True)
class PngPixels(PixelCodec):
    """Lossless PNG at zlib's fastest level: higher ones take several times as long for a few per cent."""

    level: ClassVar[int] = 1

    @property
    def spec(self) -> str:
        return "png"

    @property
    def rms_bound(self) -> float:
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"spec": self.spec, "level": self.level, "encoder": f"{_encoder('PNG')}, {_encoder('ZLib')}"}

    def capacity(self, imgsz: int) -> int:
        raw = (3 * imgsz + 1) * imgsz  # noise does not get smaller, and comes with the headers of its blocks
        return raw + raw // 8 + _HEADERS

    def expected(self, imgsz: int) -> int:
        return 3 * imgsz**2  # means of .7 to 1.9 bytes a pixel, single images 2.5

    def _file(self, bgr: np.ndarray) -> np.ndarray:
        return _encoded(".png", bgr, {cv2.IMWRITE_PNG_COMPRESSION: self.level})

    def _size(self, data: np.ndarray) -> tuple[int, int]:
        head = data[:24].tobytes()
        if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
            raise DamagedCacheError("packed pixels are no PNG file")
        return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")


def parse_packing(text: str) -> PixelCodec | None:
    """Return the codec that `--pack` names, None for "none"; raises `SettingError` for anything else."""
    match = re.fullmatch(r"jpeg(?::(\d{1,9}))?", text)
    if match:
        return JpegPixels(int(match[1])) if match[1] else JpegPixels()
    if text not in ("none", "png"):
        raise SettingError(f"--pack {text!r}; allowed: {ALLOWED}")
    return PngPixels() if text == "png" else None


def describe_packing(codec: PixelCodec | None) -> dict[str, Any]:
    """Return what identity and manifest say of how views are kept."""
    return codec.describe() if codec else {"spec": "none"}


def packing_from_description(data: Mapping[str, Any]) -> PixelCodec | None:
    """Return the codec that a manifest describes; raises `MismatchError` for one that is not known."""
    try:
        return parse_packing(str(data["spec"]))
    except SettingError:
        raise MismatchError(f"the manifest names the packing {str(data['spec'])[:40]!r}; known: {ALLOWED}") from None


def encode_labels(cls: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the row of a view's labels: five little-endian float32 a box, class and x, y, w, h.

    Args:
        cls: (n,) or (n, 1) float32. boxes: (n, 4) float32, xywh as shares of the view's size.

    Raises:
        InputDataError: more than `MAX_BOXES` of them.
    """
    if len(boxes) > MAX_BOXES:
        raise InputDataError(f"{len(boxes)} boxes, a packed view holds at most {MAX_BOXES}; choose --pack none")
    table = np.empty(len(boxes), _BOX)
    table["cls"], table["xywh"] = cls.reshape(-1), boxes
    return table.view(np.uint8).reshape(-1)


def decode_labels(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (cls (n, 1), boxes (n, 4)) float32 as `encode_labels` was given them, to the bit."""
    if len(row) % _BOX.itemsize:
        raise DamagedCacheError(f"packed labels have {len(row)} bytes, no multiple of {_BOX.itemsize}")
    table = np.frombuffer(row.tobytes(), _BOX)
    return table["cls"].astype(np.float32)[:, None], table["xywh"].astype(np.float32)


def decoder_difference(codec: PixelCodec, row: np.ndarray, pixels: np.ndarray) -> int:
    """Return by how many levels at most this machine decodes `row` to other pixels (3, H, W) than those given."""
    return int(np.abs(codec.decode(row, pixels.shape[1]).astype(np.int16) - pixels).max())


def _encoded(kind: str, bgr: np.ndarray, options: Mapping[int, int]) -> np.ndarray:
    done, data = cv2.imencode(kind, bgr, [number for pair in options.items() for number in pair])
    assert done  # OpenCV refuses images without pixels only
    return np.asarray(data)


def _segments(data: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (marker, content) of the segments of a JPEG file up to its first scan."""
    position = 2
    if data[:2].tobytes() != b"\xff\xd8":
        return
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = int(data[position + 1])
        length = int(data[position + 2]) << 8 | int(data[position + 3])
        yield marker, data[position + 4 : position + 2 + length]
        if marker == _START_OF_SCAN:
            return
        position += 2 + length


def _encoder(library: str) -> str:
    """Return name and version of a library inside OpenCV: other versions may encode to other bytes."""
    found = re.search(rf"^\s*{library}:.*\(ver ([^)\s]+)\)", cv2.getBuildInformation(), re.MULTILINE)
    return f"{library} library {found[1] if found else 'unknown'} of OpenCV {cv2.__version__}"
