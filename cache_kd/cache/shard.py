"""In: rows of one column. Out: the bytes of a Zarr v3 shard, and from such bytes single chunks again, checked first."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from cache_kd.cache.layout import CHECKSUM, ArrayLayout
from cache_kd.errors import DamagedCacheError

_ABSENT = 2**64 - 1
_BLOSC_HEADER = 16
Index = list[tuple[int, int]]


def encode_shard(rows: Sequence[np.ndarray], layout: ArrayLayout) -> bytes:
    """Return a whole shard: compressed chunks, each with its crc32c, then the index with its own.

    Args:
        rows: one array of the column's dtype and shape a sample, at most S; ragged ones 1-D u8 of any allowed length.
    """
    chunks = [_encode_chunk(chunk, layout) for chunk in _chunks(rows, layout)]
    index = np.full((layout.num_chunks, 2), _ABSENT, dtype="<u8")
    sizes = np.array([len(chunk) for chunk in chunks], dtype="<u8")
    index[: len(chunks), 0] = np.cumsum(sizes) - sizes
    index[: len(chunks), 1] = sizes
    return b"".join([*chunks, with_checksum(index.tobytes())])


def with_checksum(data: bytes) -> bytes:
    """Return `data` followed by its crc32c, as Zarr's codec does."""
    return data + int(google_crc32c.value(data)).to_bytes(CHECKSUM, "little")


def without_checksum(data: bytes | memoryview) -> np.ndarray:
    """Return the bytes (u8) before the crc32c that ends `data`; raises `DamagedCacheError` if it does not fit them."""
    body = np.frombuffer(data, np.uint8)[:-CHECKSUM]
    if len(data) < CHECKSUM or google_crc32c.value(body) != int.from_bytes(data[-CHECKSUM:], "little"):
        raise DamagedCacheError("crc32c does not match")
    return body


def tail_checksum(data: bytes, layout: ArrayLayout) -> str:
    """Return the crc32c (8 hex digits) of the end of a shard: its last chunk's checksum and its index.

    It tells a file of this cache from another of equal size, at no more cost than reading the index.
    """
    return f"{google_crc32c.value(data[-(layout.index_bytes + CHECKSUM) :]):08x}"


def read_index(descriptor: int, size: int, layout: ArrayLayout, rows: int, tail: str) -> Index:
    """Return (offset, bytes) of the chunks of an open shard file of `size` bytes that holds `rows` samples.

    Raises:
        DamagedCacheError: the index fails its checksum, is another file's, or points outside the file.
    """
    length = layout.index_bytes + CHECKSUM
    data = os.pread(descriptor, length, max(0, size - length))
    if len(data) != length:
        raise DamagedCacheError(f"the file is shorter than the {length} bytes of a shard index")
    if tail_checksum(data, layout) != tail:
        raise DamagedCacheError("the index is damaged or the file is another shard's")
    return parse_index(data[CHECKSUM:], size, layout, rows)


def parse_index(data: bytes, size: int, layout: ArrayLayout, rows: int) -> Index:
    """Return (offset, bytes) of each chunk that must be present; faults as in `read_index`."""
    try:
        body = without_checksum(data)
    except DamagedCacheError as error:
        raise DamagedCacheError(f"shard index: {error}") from error
    entries: Index = [(offset, length) for offset, length in body.view("<u8").reshape(-1, 2).tolist()]
    present = 1 if layout.column.whole else rows
    end = size - layout.index_bytes
    largest = layout.chunk_bytes + _BLOSC_HEADER + CHECKSUM
    for position, (offset, length) in enumerate(entries[:present]):
        if offset == _ABSENT:
            raise DamagedCacheError(f"shard index: chunk {position} is absent")
        if offset + length > end or not _BLOSC_HEADER + CHECKSUM < length <= largest:
            raise DamagedCacheError(f"shard index: chunk {position} has impossible bounds {offset}+{length}")
    return entries[:present]


def read_chunk(descriptor: int, entry: tuple[int, int], layout: ArrayLayout) -> np.ndarray:
    """Return one decoded chunk of an open shard file."""
    offset, length = entry
    return decode_chunk(os.pread(descriptor, length, offset), layout)


def decode_chunk(data: bytes, layout: ArrayLayout) -> np.ndarray:
    """Return the array in `data`, of `layout.chunk_shape`.

    Raises:
        DamagedCacheError: the checksum fails, or the frame declares another size than the layout does. Both are
            looked at before anything is inflated.
    """
    body = without_checksum(data)
    check_frame(data, layout)
    chunk = np.empty(layout.chunk_shape, layout.dtype)
    blosc.use_threads = False
    try:
        blosc.decompress(body, chunk)
    except (RuntimeError, ValueError) as error:
        raise DamagedCacheError(f"a chunk does not decompress: {error}") from error
    return chunk


def check_frame(data: bytes | memoryview, layout: ArrayLayout) -> None:
    """Raise `DamagedCacheError` unless the blosc header of chunk `data` declares the sizes that the layout does."""
    if len(data) < _BLOSC_HEADER + CHECKSUM:
        raise DamagedCacheError(f"a chunk of {len(data)} bytes is no blosc frame")
    inflated, _, stored = struct.unpack_from("<III", data, 4)
    if inflated != layout.chunk_bytes or stored != len(data) - CHECKSUM:
        raise DamagedCacheError(f"a chunk declares {inflated} bytes in {stored}, expected {layout.chunk_bytes}")


def _chunks(rows: Sequence[np.ndarray], layout: ArrayLayout) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the array of each chunk, padded where rows are ragged or a whole chunk is not full.

    One after the other: padded pixels of a shard would take over a hundred megabytes.
    """
    if layout.column.whole:
        block = np.full(layout.chunk_shape, layout.fill, layout.dtype)
        for position, row in enumerate(rows):
            if layout.column.ragged:
                block[position, : len(row)] = row
            else:
                block[position] = row
        yield block
        return
    for row in rows:
        if layout.column.ragged:
            yield np.concatenate([row, np.zeros(layout.chunk_bytes - len(row), np.uint8)])
        else:
            yield np.ascontiguousarray(row, layout.dtype)


def _encode_chunk(chunk: np.ndarray, layout: ArrayLayout) -> bytes:
    shuffle = blosc.SHUFFLE if layout.typesize > 1 else blosc.NOSHUFFLE
    # Several threads would lay compressed blocks in the order they finish in: other bytes every time.
    blosc.use_threads = False
    name = layout.column.compressor
    # Ragged rows are mostly padding, which one block of zstd decodes in half the time of blosc's own of 32 KB. Others
    # are 3.6 % smaller in those, each with a Huffman table of its own, for 85 µs a row of 180 KB.
    block = layout.chunk_bytes if layout.column.ragged and name == "zstd" else 0
    data = chunk.reshape(-1).view(np.uint8)
    return with_checksum(blosc.compress(data, name.encode(), 1, shuffle, block, layout.typesize))
