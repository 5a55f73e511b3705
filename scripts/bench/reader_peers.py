"""In: rows of a cache. Out: the same rows in the stores of other libraries, and from each the rows of one sample again.

A peer opens its store in the process that reads, so that nothing is shared over a fork. All bytes that it returns are
compared with ours once, by the benchmark.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_kd.cache.layout import ArrayLayout
from cache_kd.cache.reader import MAX_BLOCK_BYTES, CacheReader
from cache_kd.structures import View

Rows = dict[str, np.ndarray]
Read = Callable[[int], Rows]

BENCH = "pip install -c constraints.txt -e '.[bench]'"
STREAMING = (
    "pip install -e '.[bench-streaming]' (its numpy and python-dateutil are older than those of constraints.txt)"
)


@dataclass(frozen=True)
class Payload:
    """Which rows are read: fixed-size u8 columns of some views of a cache; sample i is image i % N of view i // N."""

    cache: Path
    columns: tuple[str, ...]
    views: tuple[View, ...]
    layouts: dict[str, ArrayLayout]
    images: int

    @classmethod
    def of(cls, cache: Path, columns: tuple[str, ...], views: tuple[View, ...]) -> Payload:
        """Return the payload after checking that its columns can be laid end to end."""
        reader = CacheReader(cache)
        layouts = {name: reader.layouts[name] for name in columns}
        assert all(layout.column.dtype == "u1" and not layout.column.ragged for layout in layouts.values())
        return cls(cache, columns, views, layouts, len(reader))

    def __len__(self) -> int:
        return self.images * len(self.views)

    def item(self, sample: int) -> tuple[View, int]:
        return self.views[sample // self.images], sample % self.images

    def rows(self) -> Iterator[Rows]:
        """Yield the rows of all samples in order, as our reader gives them."""
        read = _open_ours(self, self.cache)
        return (read(sample) for sample in range(len(self)))

    @property
    def row_bytes(self) -> int:
        """Bytes of a sample's rows end to end."""
        return sum(math.prod(layout.column.shape) for layout in self.layouts.values())

    def split(self, joined: np.ndarray) -> Rows:
        """Return the rows of one sample from its bytes end to end, without a copy."""
        rows, begin = {}, 0
        for name, layout in self.layouts.items():
            end = begin + math.prod(layout.column.shape)
            rows[name] = joined[begin:end].reshape(layout.column.shape)
            begin = end
        return rows


@dataclass(frozen=True)
class Peer:
    """One way to keep and read the rows.

    Attributes:
        compression: of the rows; "none" marks a peer that is no match in bytes.
        checksum: what is verified on each read.
        write: fills a folder; None: reads the cache's own files.
    """

    packages: tuple[str, ...]
    extra: str
    compression: str
    checksum: str
    open: Callable[[Payload, Path], Read]
    write: Callable[[Payload, Path], None] | None = None

    def missing(self) -> list[str]:
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


def _joined(rows: Rows) -> np.ndarray:
    return np.concatenate([row.reshape(-1) for row in rows.values()])


def _open_ours(payload: Payload, folder: Path) -> Read:
    reader = CacheReader(payload.cache)

    def read(sample: int) -> Rows:
        view, index = payload.item(sample)
        return reader.read(view, index, payload.columns)

    return read


def _open_zarr(payload: Payload, folder: Path) -> Read:
    import zarr

    def opened(view: View, name: str) -> Any:
        layout = payload.layouts[name]
        array = zarr.open_array(store=str(payload.cache / layout.folder(view)), mode="r", zarr_format=3)
        return array[:] if layout.column.whole else array  # what shares a chunk is read once, as ours is

    arrays = {view: {name: opened(view, name) for name in payload.columns} for view in payload.views}

    def read(sample: int) -> Rows:
        view, index = payload.item(sample)
        return {name: np.asarray(array[index]) for name, array in arrays[view].items()}

    return read


def _open_tensorstore(payload: Payload, folder: Path) -> Read:
    import tensorstore

    def opened(view: View, name: str) -> Any:
        layout = payload.layouts[name]
        # Room for the shards' indices and two rows: more would keep decoded rows and measure no reading.
        room = MAX_BLOCK_BYTES if layout.column.whole else 2 * (layout.num_shards * layout.index_bytes + 2**14)
        if not layout.column.whole:
            room += 2 * layout.chunk_bytes
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(payload.cache / layout.folder(view))},
            "recheck_cached_metadata": "open",
            "recheck_cached_data": "open",
        }
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": room}})
        return tensorstore.open(spec, context=context, read=True).result()

    arrays = {view: {name: opened(view, name) for name in payload.columns} for view in payload.views}

    def read(sample: int) -> Rows:
        view, index = payload.item(sample)
        under_way = {name: array[index].read() for name, array in arrays[view].items()}
        return {name: future.result() for name, future in under_way.items()}

    return read


def _write_torch(payload: Payload, folder: Path) -> None:
    for sample, rows in enumerate(payload.rows()):
        torch.save({name: torch.from_numpy(row) for name, row in rows.items()}, folder / f"{sample:06d}.pt")


def _open_torch(payload: Payload, folder: Path) -> Read:
    def read(sample: int) -> Rows:
        loaded = torch.load(folder / f"{sample:06d}.pt", weights_only=True)
        return {name: row.numpy() for name, row in loaded.items()}

    return read


def _write_safetensors(payload: Payload, folder: Path) -> None:
    from safetensors.numpy import save_file

    for sample, rows in enumerate(payload.rows()):
        save_file(rows, folder / f"{sample:06d}.safetensors")


def _open_safetensors(payload: Payload, folder: Path) -> Read:
    from safetensors.numpy import load_file

    return lambda sample: load_file(folder / f"{sample:06d}.safetensors")


def _write_mds(payload: Payload, folder: Path) -> None:
    from numcodecs import Zstd
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"rows": "bytes"}) as writer:
        for rows in payload.rows():
            writer.write({"rows": bytes(Zstd(1).encode(_joined(rows)))})


def _open_mds(payload: Payload, folder: Path) -> Read:
    from numcodecs import Zstd
    from streaming import LocalDataset

    dataset, codec, size = LocalDataset(str(folder)), Zstd(1), payload.row_bytes

    def read(sample: int) -> Rows:
        joined = np.empty(size, np.uint8)
        codec.decode(dataset[sample]["rows"], joined)
        return payload.split(joined)

    return read


def _write_mds_raw(payload: Payload, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=dict.fromkeys(payload.columns, "ndarray")) as writer:
        for rows in payload.rows():
            writer.write(rows)


def _open_mds_raw(payload: Payload, folder: Path) -> Read:
    from streaming import LocalDataset

    dataset = LocalDataset(str(folder))
    return lambda sample: dict(dataset[sample])


def _write_litdata(payload: Payload, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes="64MB", compression="zstd:1", compression_level="sample")
    for sample, rows in enumerate(payload.rows()):
        cache[sample] = rows
    cache.done()
    cache.merge()


def _open_litdata(payload: Payload, folder: Path) -> Read:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder), batch_decode=0)  # decode the sample asked for, not its neighbours
    return lambda sample: dataset[sample]


def _write_blosc2(payload: Payload, folder: Path) -> None:
    import blosc2

    settings = {
        "codec": blosc2.Codec.ZSTD, "clevel": 1, "typesize": 1, "nthreads": 1, "blocksize": payload.row_bytes,
        "filters": [blosc2.Filter.NOFILTER],
    }  # fmt: skip
    store = blosc2.SChunk(
        chunksize=payload.row_bytes, urlpath=str(folder / "rows.b2frame"), contiguous=True, cparams=settings
    )
    for rows in payload.rows():
        store.append_data(_joined(rows))


def _open_blosc2(payload: Payload, folder: Path) -> Read:
    import blosc2

    store = blosc2.open(str(folder / "rows.b2frame"), mode="r", dparams={"nthreads": 1})
    size = payload.row_bytes

    def read(sample: int) -> Rows:
        joined = np.empty(size, np.uint8)
        store.decompress_chunk(sample, dst=joined)
        return payload.split(joined)

    return read


OURS = "ours"
PEERS = {
    OURS: Peer((), "", "blosc zstd 1", "crc32c of every chunk and index, always", _open_ours),
    "zarr-python": Peer((), "", "the same files", "crc32c of every chunk and index, always", _open_zarr),
    "tensorstore": Peer(
        ("tensorstore",), BENCH, "the same files", "crc32c of every chunk and index, always", _open_tensorstore
    ),
    "blosc2": Peer(("blosc2",), BENCH, "blosc2 zstd 1", "none", _open_blosc2, _write_blosc2),
    "MDS, rows in zstd": Peer(
        ("streaming",), STREAMING, "zstd 1, a frame a sample", "none while reading", _open_mds, _write_mds
    ),
    "LitData": Peer(("litdata",), STREAMING, "its own zstd 1, a frame a sample", "none", _open_litdata, _write_litdata),
    "MDS, unpacked": Peer(("streaming",), STREAMING, "none", "none while reading", _open_mds_raw, _write_mds_raw),
    "torch.save": Peer((), "", "none", "none", _open_torch, _write_torch),
    "safetensors": Peer(("safetensors",), BENCH, "none", "none", _open_safetensors, _write_safetensors),
}


def describe(payload: Payload) -> dict[str, Any]:
    """Return what is read, for the record."""
    columns = {name: list(layout.column.shape) for name, layout in payload.layouts.items()}
    return {"samples": len(payload), "bytes_decoded": payload.row_bytes, "columns": columns}
