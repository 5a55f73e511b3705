"""In: columns and the number of images. Out: the arrays, chunks, shards and paths they become, and their metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cache_kd.cache.files import brief
from cache_kd.errors import DamagedCacheError, SettingError
from cache_kd.structures import Column, View

FORMAT = 1
MAX_SAMPLES = 128
MAX_SHARD_BYTES = 128 * 2**20
MAX_CHUNK_BYTES = 2**30  # blosc ends at 2 GiB; no honest row comes near
INDEX_ENTRY = 16
CHECKSUM = 4
DTYPES = {"u1": "uint8", "i1": "int8", "u2": "uint16", "i4": "int32", "u4": "uint32", "f2": "float16", "f4": "float32"}
COMPRESSORS = ("zstd", "lz4")
CODECS = ("blosc", "bytes", "crc32c", "sharding_indexed")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def length_name(column: str) -> str:
    """Return the name of the column that holds the row lengths of ragged `column`."""
    return f"{column}_length"


def stored_columns(columns: Iterable[Column]) -> tuple[Column, ...]:
    """Return all columns on disk: those given, and a length column after each ragged one."""
    stored: list[Column] = []
    for column in columns:
        stored.append(column)
        if column.ragged:
            stored.append(Column(length_name(column.name), "u4", (), whole=True))
    return tuple(stored)


def shard_size(columns: Iterable[Column]) -> int:
    """Return S, the samples of a shard: at most 128, and at most 128 MiB of their rows before compression.

    Ragged rows count with what they are expected to take, not with the room that they have.
    """
    row = sum(
        column.expected if column.ragged and not column.whole else column.row_bytes
        for column in stored_columns(columns)
    )
    return max(1, min(MAX_SAMPLES, MAX_SHARD_BYTES // max(1, row)))


def column_faults(columns: Iterable[Column]) -> list[str]:
    """Return what forbids to store `columns`, one sentence a fault; none is good."""
    faults: list[str] = []
    names: set[str] = set()
    for column in stored_columns(columns):
        where = f"column {column.name!r}"
        if not _NAME.fullmatch(column.name):
            faults.append(f"{where}: a name has letters, digits, '_', '-' and '.', and does not begin with '.' or '-'")
        if column.name in names:
            faults.append(f"{where}: named twice")
        names.add(column.name)
        if column.dtype not in DTYPES:
            faults.append(f"{where}: dtype {column.dtype!r}; allowed: {', '.join(DTYPES)}")
            continue
        if any(size < 1 for size in column.shape) or len(column.shape) > 8:
            faults.append(f"{where}: shape {column.shape}; allowed: at most 8 axes of at least 1")
        elif math.prod(column.shape) * np.dtype(column.dtype).itemsize > MAX_CHUNK_BYTES:
            faults.append(f"{where}: a row of shape {column.shape} is over {MAX_CHUNK_BYTES} bytes")
        if column.ragged and (column.dtype != "u1" or len(column.shape) != 1):
            faults.append(f"{where}: ragged columns have dtype u1 and one axis")
        if column.compressor not in COMPRESSORS:
            faults.append(
                f"{where}: compressor {brief(repr(column.compressor), 20)}; allowed: {', '.join(COMPRESSORS)}"
            )
        if not 0 <= column.typesize <= 255:
            faults.append(f"{where}: typesize {column.typesize}; allowed: 0 to 255")
    return faults


def check_columns(columns: Iterable[Column]) -> None:
    """Raise `SettingError` with all faults of `columns` in one line."""
    columns = tuple(columns)
    if faults := column_faults(columns):
        raise SettingError(f"columns cannot be stored: {'; '.join(faults)}")


def check_array_name(name: str) -> None:
    """Raise `SettingError` unless `name` can name an array of the teacher."""
    if not _NAME.fullmatch(name) or name in ("zarr.json", "c"):
        raise SettingError(f"array name {name!r}: allowed are letters, digits, '_', '-' and '.', not first '.' or '-'")


@dataclass(frozen=True)
class ArrayLayout:
    """One column of one view as a sharded Zarr array: N images, S samples a shard."""

    column: Column
    num_images: int
    samples: int

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.column.dtype).newbyteorder("<")

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.samples if self.column.whole else 1, *self.column.shape)

    @cached_property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @cached_property
    def num_chunks(self) -> int:
        """Chunks of a shard."""
        return 1 if self.column.whole else self.samples

    @cached_property
    def index_bytes(self) -> int:
        return self.num_chunks * INDEX_ENTRY + CHECKSUM

    @cached_property
    def typesize(self) -> int:
        return self.column.typesize or self.dtype.itemsize

    @cached_property
    def fill(self) -> float | int:
        return math.nan if self.dtype.kind == "f" else 0

    @cached_property
    def num_shards(self) -> int:
        return -(-self.num_images // self.samples)

    def rows(self, shard: int) -> int:
        """Return how many samples `shard` holds; the last one may hold fewer than S."""
        return min(self.samples, self.num_images - shard * self.samples)

    def folder(self, view: View) -> str:
        return f"views/{view.name}/{self.column.name}"

    def shard_path(self, view: View, shard: int) -> str:
        """Return the shard's path in the cache, '/' between the parts."""
        return "/".join([self.folder(view), "c", str(shard), *("0" for _ in self.column.shape)])

    def metadata(self) -> dict[str, Any]:
        """Return what `zarr.json` of this array holds."""
        shuffle = "shuffle" if self.typesize > 1 else "noshuffle"
        name = self.column.compressor
        blosc = {"typesize": self.typesize, "cname": name, "clevel": 1, "shuffle": shuffle, "blocksize": 0}
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": [_bytes_codec(self.dtype), {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        shape, shard_shape = (self.num_images, *self.column.shape), (self.samples, *self.column.shape)
        return _array_metadata(
            shape, shard_shape, self.column.dtype, [{"name": "sharding_indexed", "configuration": sharding}]
        )


def layouts(columns: Iterable[Column], num_images: int, samples: int) -> dict[str, ArrayLayout]:
    """Return the layout of every stored column by name."""
    return {column.name: ArrayLayout(column, num_images, samples) for column in stored_columns(columns)}


def teacher_path(name: str, axes: int) -> str:
    """Return the path of the only chunk of the teacher's array `name`."""
    return "/".join(["teacher", name, "c", *("0" for _ in range(axes))])


def teacher_metadata(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """Return what `zarr.json` of one of the teacher's arrays holds: one chunk with its checksum."""
    return _array_metadata(shape, shape, dtype, [_bytes_codec(np.dtype(dtype)), {"name": "crc32c"}])


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return what `zarr.json` of a group holds."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def _array_metadata(shape: tuple[int, ...], grid: tuple[int, ...], dtype: str, codecs: list[Any]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": DTYPES[dtype],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if dtype in ("f2", "f4") else 0,
        "codecs": codecs,
        "attributes": {},
        "storage_transformers": [],
    }


def check_metadata(found: Any, expected: Mapping[str, Any], where: str) -> None:
    """Raise `DamagedCacheError` unless the `zarr.json` content `found` declares exactly what the manifest does.

    The manifest decides how bytes are read; this check keeps other Zarr readers from being told something else, and
    stops at any codec or dtype that is not on the list before anything is decoded.
    """
    if not isinstance(found, dict):
        raise DamagedCacheError(f"{where}: not a JSON object")
    if unknown := sorted(_codec_names(found.get("codecs")) - set(CODECS)):
        names = brief(", ".join(unknown))
        raise DamagedCacheError(f"{where}: codec {names} is not allowed; allowed: {', '.join(CODECS)}")
    if found.get("node_type") == "array" and found.get("data_type") not in DTYPES.values():
        allowed = ", ".join(DTYPES.values())
        name = brief(repr(found.get("data_type")))
        raise DamagedCacheError(f"{where}: data_type {name} is not allowed; allowed: {allowed}")
    for key in sorted({*found, *expected} - {"attributes", "dimension_names"}):
        if key == "storage_transformers" and not found.get(key):
            continue
        if _normal(found.get(key)) != _normal(expected.get(key)):
            raise DamagedCacheError(
                f"{where}: {key} is {brief(repr(found.get(key)))}, the manifest declares {expected.get(key)!r}"
            )


def _codec_names(codecs: Any) -> set[str]:
    """Return the names of all codecs, those inside shards included."""
    names: set[str] = set()
    for codec in codecs if isinstance(codecs, list) else []:
        if not isinstance(codec, dict):
            names.add(str(codec))
            continue
        names.add(str(codec.get("name")))
        configuration = codec.get("configuration")
        if isinstance(configuration, dict):
            names |= _codec_names(configuration.get("codecs")) | _codec_names(configuration.get("index_codecs"))
    return names


def _normal(value: Any) -> Any:
    """Return metadata with the spellings that Zarr treats alike made equal: an absent and an empty configuration."""
    if isinstance(value, list):
        return [_normal(item) for item in value]
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items() if not (key == "configuration" and not item)}
    return value


def check_with_zarr(content: bytes, expected: Mapping[str, Any]) -> None:
    """Raise `DamagedCacheError` unless zarr-python opens an array of this `zarr.json` as it is declared."""
    # Only verification asks zarr-python; training reads without it.
    import zarr
    from zarr.core.buffer import default_buffer_prototype

    try:
        buffer = default_buffer_prototype().buffer.from_bytes(content)
        store = zarr.storage.MemoryStore({"zarr.json": buffer})
        array = zarr.open_array(store=store, mode="r", zarr_format=3)
    except Exception as error:  # zarr raises many kinds; each means that it cannot open the array
        raise DamagedCacheError(f"zarr cannot open it: {error}") from error
    if list(array.shape) != expected["shape"] or str(array.dtype) != expected["data_type"]:
        raise DamagedCacheError(f"zarr sees {array.shape} {array.dtype}, declared {expected['shape']}")
