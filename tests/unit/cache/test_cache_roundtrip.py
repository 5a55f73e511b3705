"""What is written is read back to the bit, by our reader and by zarr-python, over all sorts of columns."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_cases import DATA, GIVEN, MIXED, PLAIN, SMALL, arrays, open_writer, rows_of, write_views
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.codecs import BloscCodec, Crc32cCodec

from cache_kd.cache import CacheReader, layout, verify_cache
from cache_kd.cache.layout import COMPRESSORS, DTYPES, ArrayLayout, stored_columns
from cache_kd.cache.manifest import columns_to_json
from cache_kd.cache.shard import decode_chunk, encode_shard, parse_index
from cache_kd.structures import Column


@st.composite
def columns(draw: st.DrawFn) -> Column:
    name = draw(st.sampled_from(COMPRESSORS))
    if draw(st.booleans()):
        size = draw(st.integers(1, 20))
        return Column("rows", "u1", (size,), ragged=True, whole=draw(st.booleans()), compressor=name)
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    size = draw(st.sampled_from([0, 1, 2, 4]))
    return Column("rows", dtype, shape, whole=draw(st.booleans()), typesize=size, compressor=name)


@st.composite
def columns_with_rows(draw: st.DrawFn) -> tuple[Column, list[np.ndarray]]:
    column = draw(columns())
    count = draw(st.integers(1, 8))
    lengths = [draw(st.integers(0, column.shape[0])) for _ in range(count)] if column.ragged else []
    shapes = [(length,) for length in lengths] or [column.shape] * count
    return column, [draw(hnp.arrays(column.dtype, shape)) for shape in shapes]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns_with_rows())
def test_rows_read_back_equal_and_zarr_python_agrees(case: tuple[Column, list[np.ndarray]]) -> None:
    column, rows = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache")
        with open_writer(path, (column,), num_images=len(rows)) as writer:
            for shard in writer.units(MIXED):
                writer.write_unit(MIXED, shard, {"rows": [rows[i] for i in writer.samples(shard)]}, {})
            writer.finish([MIXED], GIVEN)
        reader = CacheReader(path)
        seen = zarr.open_group(str(path), mode="r")[f"views/{MIXED.name}/rows"][:]
        assert seen.dtype == np.dtype(column.dtype)
        for index, row in enumerate(rows):
            read = reader.read_row(MIXED, "rows", index)
            assert read.dtype == row.dtype
            assert read.shape == row.shape
            assert read.tobytes() == row.tobytes()
            assert seen[index][: len(row)].tobytes() == row.tobytes() if column.ragged else True
            assert column.ragged or seen[index].tobytes() == row.tobytes()


def test_rows_are_the_readers_own_and_writable(cache: Path) -> None:
    reader = CacheReader(cache)
    for column in SMALL:
        first = reader.read_row(MIXED, column.name, 1)
        expected = first.copy()
        first[...] = 0
        assert np.array_equal(reader.read_row(MIXED, column.name, 1), expected)


def test_read_gives_the_named_columns(cache: Path) -> None:
    read = CacheReader(cache).read(MIXED, 4, ["labels", "table"])
    rows = rows_of(SMALL, MIXED)
    assert list(read) == ["labels", "table"]
    assert all(np.array_equal(read[name], rows[name][4]) for name in read)


@pytest.mark.parametrize("column", stored_columns(SMALL), ids=lambda column: column.name)
def test_metadata_is_what_zarr_python_writes(column: Column, tmp_path: Path) -> None:
    ours = ArrayLayout(column, 7, 3)
    theirs = json.loads((tmp_path / "a" / "zarr.json").read_text()) if _zarr_array(tmp_path, ours) is not None else {}
    assert theirs == ours.metadata()


@pytest.mark.parametrize("column", SMALL, ids=lambda column: column.name)
def test_shards_written_by_zarr_python_are_read(column: Column, tmp_path: Path) -> None:
    ours = ArrayLayout(column, 6, 3)
    values = np.stack([np.ones(column.shape, column.dtype) * i for i in range(6)])
    _zarr_array(tmp_path, ours)[:] = values
    for shard in range(2):
        data = tmp_path.joinpath("a", "c", str(shard), *("0" for _ in column.shape)).read_bytes()
        index = parse_index(data[len(data) - ours.index_bytes :], len(data), ours, 3)
        chunks = [decode_chunk(data[offset : offset + size], ours) for offset, size in index]
        assert np.array_equal(np.concatenate(chunks), values[3 * shard : 3 * shard + 3])


def test_the_same_rows_give_the_same_shard_bytes() -> None:
    column = Column("features", "u1", (3_000_000,))
    row = np.random.default_rng(0).integers(0, 9, 3_000_000).astype("u1")
    first = encode_shard([row], ArrayLayout(column, 1, 1))
    assert all(encode_shard([row], ArrayLayout(column, 1, 1)) == first for _ in range(4))


def test_every_chunk_of_every_sample_is_stored_even_if_zero(tmp_path: Path) -> None:
    ours = ArrayLayout(Column("features", "u1", (8,)), 2, 3)
    data = encode_shard([np.zeros(8, "u1")] * 2, ours)
    assert len(parse_index(data[len(data) - ours.index_bytes :], len(data), ours, 2)) == 2


def test_padding_of_whole_float_chunks_is_nan(cache: Path) -> None:
    ours = ArrayLayout(Column("table", "f4", (2,), whole=True), 2, 3)
    data = encode_shard([np.zeros(2, "f4")] * 2, ours)
    ((offset, size),) = parse_index(data[len(data) - ours.index_bytes :], len(data), ours, 2)
    assert np.isnan(decode_chunk(data[offset : offset + size], ours)[2]).all()


def test_teacher_arrays_read_back_and_zarr_python_agrees(cache: Path) -> None:
    reader, group = CacheReader(cache), zarr.open_group(str(cache), mode="r")
    for name, array in arrays().items():
        read = reader.read_teacher(name)
        assert read.dtype == array.dtype
        assert np.array_equal(read, array)
        assert np.array_equal(group[f"teacher/{name}"][...], array)


def test_data_reads_back(cache: Path) -> None:
    assert CacheReader(cache).read_data() == DATA


def test_shard_size_has_128_samples_and_128_mib_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert layout.shard_size([Column("a", "u1", (1,))]) == 128
    assert layout.shard_size([Column("a", "u1", (2**20,)), Column("b", "f4", (2**18,))]) == 64
    assert layout.shard_size([Column("a", "u1", (2**20 + 1,))]) == 127
    assert layout.shard_size([Column("a", "u1", (2**28,))]) == 1
    assert layout.shard_size([Column("a", "u1", (2**28,), ragged=True)]) == 128
    assert layout.shard_size([Column("a", "u1", (2**28,), ragged=True, expected=2**21)]) == 63  # and its length


def test_what_rows_are_expected_to_take_is_no_part_of_a_cache() -> None:
    known, unknown = (Column("a", "u1", (2**20,), ragged=True, expected=size) for size in (2**19, 0))
    assert columns_to_json([known]) == columns_to_json([unknown]) and known == unknown


def test_num_bytes_counts_the_shard_files(cache: Path) -> None:
    on_disk = sum(path.stat().st_size for path in cache.glob("views/*/*/c/**/*") if path.is_file())
    assert CacheReader(cache).num_bytes == on_disk > 0


def test_a_sound_cache_verifies(cache: Path) -> None:
    write_views(cache, PLAIN)
    seen: list[tuple[int, int]] = []
    report = verify_cache(cache, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.notes == ()
    assert report.files == len(seen) == 2 * 3 * len(stored_columns(SMALL))
    assert seen[-1][0] == seen[-1][1] == report.bytes


def _zarr_array(folder: Path, ours: ArrayLayout) -> zarr.Array:
    shuffle = "shuffle" if ours.typesize > 1 else "noshuffle"
    return zarr.create_array(
        store=str(folder),
        name="a",
        shape=(ours.num_images, *ours.column.shape),
        dtype=DTYPES[ours.column.dtype],
        chunks=ours.chunk_shape,
        shards=(ours.samples, *ours.column.shape),
        fill_value=ours.fill,
        compressors=[
            BloscCodec(typesize=ours.typesize, cname=ours.column.compressor, clevel=1, shuffle=shuffle),
            Crc32cCodec(),
        ],
        zarr_format=3,
        config={"write_empty_chunks": True},
    )
