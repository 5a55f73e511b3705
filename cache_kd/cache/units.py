"""In: the rows of one unit. Out: the shard files they become, each with its entry, or which row does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cache_kd.cache.files import sha256
from cache_kd.cache.layout import ArrayLayout, layouts, length_name, shard_size
from cache_kd.cache.records import FileEntry
from cache_kd.cache.shard import encode_shard, tail_checksum
from cache_kd.errors import InputDataError
from cache_kd.structures import Column, View

Rows = Mapping[str, list[np.ndarray]]


def check_rows(rows: Rows, columns: Sequence[Column], samples: range, shard: int) -> None:
    """Raise `InputDataError` unless `rows` are those of `columns`, one array a sample of `shard`."""
    names = [column.name for column in columns]
    if set(rows) != set(names):
        raise InputDataError(f"rows of columns {', '.join(sorted(rows))}; expected {', '.join(sorted(names))}")
    for column in columns:
        if len(rows[column.name]) != len(samples):
            raise InputDataError(
                f"column {column.name!r}: {len(rows[column.name])} rows, shard {shard} has {len(samples)} samples"
            )
        for index, row in zip(samples, rows[column.name], strict=True):
            if fault := _row_fault(row, column):
                raise InputDataError(f"column {column.name!r}, sample {index}: {fault}")


def encode_unit(
    rows: Rows, layouts: Mapping[str, ArrayLayout], view: View, shard: int
) -> Iterator[tuple[FileEntry, bytes]]:
    """Yield (entry, content) of each shard file of one unit; length columns are added."""
    for layout in layouts.values():
        content = encode_shard(_values(rows, layout, layouts), layout)
        path = layout.shard_path(view, shard)
        yield file_entry(path, content, layout), content


def file_entry(path: str, content: bytes, layout: ArrayLayout) -> FileEntry:
    """Return what records and lists say of a shard file with this content."""
    return FileEntry(path, len(content), sha256(content), tail_checksum(content, layout))


def measure_rows(rows: Rows, columns: Sequence[Column], num_images: int) -> dict[str, np.ndarray]:
    """Return the bytes that each of these rows of a few samples takes in a cache of `num_images`, by array.

    A row's share of the indices of the shards is in it; of chunks that hold a whole shard, every row has the mean.
    """
    every = layouts(columns, num_images, shard_size(columns))
    return {name: _row_bytes(_values(rows, layout, every), layout) for name, layout in every.items()}


def _row_bytes(values: list[np.ndarray], layout: ArrayLayout) -> np.ndarray:
    step = layout.samples if layout.column.whole else 1
    parts = [values[start : start + step] for start in range(0, len(values), step)]
    sizes = [len(encode_shard(part, layout)) - layout.index_bytes for part in parts]
    index = layout.index_bytes * layout.num_shards / layout.num_images
    if layout.column.whole:
        return np.full(len(values), sum(sizes) / len(values) + index)
    return np.array(sizes) + index


def _values(rows: Rows, layout: ArrayLayout, layouts: Mapping[str, ArrayLayout]) -> list[np.ndarray]:
    """Return the rows of one array: a column's own, or the lengths of a ragged one."""
    name = layout.column.name
    if name in rows:
        return rows[name]
    ragged = next(other for other in rows if layouts[other].column.ragged and length_name(other) == name)
    return [np.array(len(row), "<u4") for row in rows[ragged]]


def _row_fault(row: np.ndarray, column: Column) -> str:
    if row.dtype != np.dtype(column.dtype):
        return f"dtype {row.dtype.str[1:]}, expected {column.dtype}"
    if column.ragged:
        if row.ndim != 1 or len(row) > column.shape[0]:
            return f"shape {row.shape}, expected one axis of at most {column.shape[0]}"
    elif row.shape != column.shape:
        return f"shape {row.shape}, expected {column.shape}"
    return ""
