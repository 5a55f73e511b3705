"""Whatever happens to a cache's files, reading gives the right rows or one line that names file, view and sample."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import MIXED, NUM_IMAGES, PLAIN, SMALL, rows_of, write_views

from cache_kd.cache import CacheReader, layout, reader, verify_cache
from cache_kd.cache.files import open_seal, seal, sha256
from cache_kd.cache.layout import ArrayLayout
from cache_kd.cache.shard import decode_chunk, encode_shard, read_index, with_checksum
from cache_kd.errors import DamagedCacheError, MismatchError, MissingFileError, SettingError
from cache_kd.fingerprint import canonical_json
from cache_kd.structures import Column, View

NAMES = [column.name for column in SMALL]


def read_all(path: Path) -> list[str]:
    """Read every row of MIXED; returns the errors, checks that everything else is right."""
    rows, errors = rows_of(SMALL, MIXED), []
    opened = CacheReader(path)
    for name in NAMES:
        for index in range(NUM_IMAGES):
            try:
                assert np.array_equal(opened.read_row(MIXED, name, index), rows[name][index])
            except DamagedCacheError as error:
                errors.append(str(error))
    return errors


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_bytes(canonical_json(content))


def fork(work: Callable[[], Any]) -> int:
    """Return the number of a child process that does `work` and ends there, with 1 if it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)  # a child that went on would run the remaining tests a second time
    return child


def inner(metadata: dict[str, Any]) -> list[Any]:
    """Return the codecs of a chunk inside a shard."""
    codecs: list[Any] = metadata["codecs"][0]["configuration"]["codecs"]
    return codecs


@pytest.mark.parametrize("file", ["features/c/1/0", "labels/c/2/0", "labels_length/c/1", "half/c/0/0/0", "table/c/2/0"])
def test_a_changed_byte_anywhere_in_a_shard_is_an_error(cache: Path, file: str) -> None:
    path = cache / "views/mixed-0000" / file
    good = path.read_bytes()
    step = max(1, len(good) // 25)
    for position in sorted({*range(0, len(good), step), *range(max(0, len(good) - 60), len(good), 3)}):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        errors = read_all(cache)
        faults = verify_cache(cache).faults
        assert [fault.file for fault in faults] == [f"views/mixed-0000/{file}"], position
        assert faults[0].view == "mixed-0000"
        assert faults[0].samples
        # The reader refuses each sample that verification calls spoilt; of this shard all if its end is changed.
        spoilt = {index for fault in faults for index in range(fault.samples[0], fault.samples[1] + 1)}
        refused = {int(error.split("sample ")[1].split(")")[0]) for error in errors}
        assert spoilt <= refused, position
        assert len(errors) == len(refused) <= 3, position


def test_an_error_names_file_view_sample_and_command(cache: Path) -> None:
    path = cache / "views/mixed-0000/features/c/1/0"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    expected = rf"^{path}: crc32c does not match \(view mixed-0000, sample 3\); run `cache-kd verify {cache}`$"
    with pytest.raises(DamagedCacheError, match=expected):
        CacheReader(cache).read_row(MIXED, "features", 3)


def test_a_missing_shard_is_an_error_where_zarr_would_read_fill_values(cache: Path) -> None:
    path = cache / "views/mixed-0000/table/c/1/0"
    path.unlink()
    with pytest.raises(DamagedCacheError, match=r"table/c/1/0: the file is missing \(view mixed-0000, sample 3\)"):
        CacheReader(cache).read_row(MIXED, "table", 3)
    assert [str(fault) for fault in verify_cache(cache).faults] == [
        "views/mixed-0000/table/c/1/0: the file is missing (view mixed-0000, samples 3 to 5)"
    ]


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_cut_shard_is_an_error(cache: Path, keep: int) -> None:
    path = cache / "views/mixed-0000/features/c/1/0"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedCacheError, match=r"the file has \d+ bytes, shards\.json says"):
        CacheReader(cache).read_row(MIXED, "features", 5)
    assert not verify_cache(cache).ok


@pytest.mark.parametrize("column", ["features", "pixel_hash"])
def test_two_shards_exchanged_are_errors_even_of_equal_size(cache: Path, column: str) -> None:
    folder = cache / "views/mixed-0000" / column / "c"
    first, second = (folder / "0" / "0").read_bytes(), (folder / "1" / "0").read_bytes()
    if column == "pixel_hash":
        assert len(first) == len(second)
    (folder / "0" / "0").write_bytes(second)
    (folder / "1" / "0").write_bytes(first)
    with pytest.raises(DamagedCacheError, match=r"shards\.json says|another shard's"):
        CacheReader(cache).read_row(MIXED, column, 0)
    assert len(verify_cache(cache).faults) == 2


def test_an_absent_chunk_is_an_error(tmp_path: Path) -> None:
    ours = ArrayLayout(Column("a", "u1", (8,)), 3, 3)
    two = encode_shard([np.ones(8, "u1")] * 2, ours)
    (tmp_path / "shard").write_bytes(two)
    tail = sha256(two)[:8]
    with (tmp_path / "shard").open("rb") as file, pytest.raises(DamagedCacheError, match="another shard's"):
        read_index(file.fileno(), len(two), ours, 2, tail)
    from cache_kd.cache.shard import tail_checksum

    with (tmp_path / "shard").open("rb") as file:
        assert len(read_index(file.fileno(), len(two), ours, 2, tail_checksum(two, ours))) == 2
        with pytest.raises(DamagedCacheError, match="chunk 2 is absent"):
            read_index(file.fileno(), len(two), ours, 3, tail_checksum(two, ours))


def test_a_frame_that_inflates_to_more_is_refused_before_inflating(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = Column("a", "u1", (2**20,)), ArrayLayout(Column("a", "u1", (64,)), 1, 1)
    bomb = encode_shard([np.zeros(2**20, "u1")], ArrayLayout(large, 1, 1))[: -(16 + 4)]
    from cache_kd.cache import shard

    monkeypatch.setattr(shard.blosc, "decompress", lambda *_: pytest.fail("inflated"))
    with pytest.raises(DamagedCacheError, match="a chunk declares 1048576 bytes"):
        decode_chunk(bomb, small)
    with pytest.raises(DamagedCacheError, match="no blosc frame"):
        decode_chunk(with_checksum(b"short"), small)


@pytest.mark.parametrize("index", [-1, NUM_IMAGES])
def test_an_index_out_of_range_is_one_line(cache: Path, index: int) -> None:
    with pytest.raises(SettingError, match=f"no sample {index}; allowed: 0 to 6"):
        CacheReader(cache).read_row(MIXED, "half", index)


def test_unknown_names_list_the_known_ones(cache: Path) -> None:
    opened = CacheReader(cache)
    with pytest.raises(SettingError, match=r"no column 'feature'; known: features, .*did you mean 'features'"):
        opened.read_row(MIXED, "feature", 0)
    with pytest.raises(SettingError, match="no view plain-0000; known: mixed-0000"):
        opened.read_row(PLAIN, "half", 0)
    with pytest.raises(SettingError, match=r"no teacher array 'scales'; .*did you mean 'scale'"):
        opened.read_teacher("scales")


def test_a_view_on_disk_that_no_manifest_lists_is_not_there(cache: Path) -> None:
    shutil.copytree(cache / "views/mixed-0000", cache / "views/plain-0000")
    with pytest.raises(SettingError, match="no view plain-0000"):
        CacheReader(cache).read_row(PLAIN, "half", 0)
    assert any(note.startswith("views/plain-0000/") for note in verify_cache(cache).notes)


def test_a_pickled_reader_reads(cache: Path) -> None:
    opened = CacheReader(cache)
    opened.read(MIXED, 1, NAMES)
    copy = pickle.loads(pickle.dumps(opened))
    assert np.array_equal(copy.read_row(MIXED, "half", 1), rows_of(SMALL, MIXED)["half"][1])


def test_a_fork_after_opening_reads_with_files_of_its_own(cache: Path) -> None:
    opened = CacheReader(cache)
    rows = rows_of(SMALL, MIXED)
    for index in range(NUM_IMAGES):
        opened.read(MIXED, index, NAMES)
    inherited = {shard.descriptor for shard in opened._state.shards.values()}
    read_end, write_end = os.pipe()

    def in_child() -> None:
        right = all(np.array_equal(opened.read_row(MIXED, n, i), rows[n][i]) for n in NAMES for i in range(NUM_IMAGES))
        own = opened._state.pid == os.getpid() and len(opened._state.shards) == len(inherited)
        os.write(write_end, b"ok" if right and own else b"no")

    child = fork(in_child)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read_end, 2) == b"ok"
    os.close(read_end)
    os.close(write_end)
    assert all(np.array_equal(opened.read_row(MIXED, n, i), rows[n][i]) for n in NAMES for i in range(NUM_IMAGES))


def test_a_fork_while_another_thread_reads_does_not_hang(cache: Path) -> None:
    opened = CacheReader(cache)
    opened.read(MIXED, 0, NAMES)
    with opened._state.lock:
        child = fork(lambda: opened.read(MIXED, 0, NAMES))
        done = threading.Event()
        threading.Timer(10, lambda: done.is_set() or os.kill(child, 9)).start()
        assert os.waitpid(child, 0)[1] == 0
        done.set()


def test_threads_read_right_rows_while_files_are_closed_and_opened(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN", 2)
    opened, rows, right = CacheReader(cache), rows_of(SMALL, MIXED), []
    read_chunk = reader.read_chunk

    def slow_read_chunk(*args: Any) -> np.ndarray:
        time.sleep(0.0005)  # time for another thread to close the file
        return read_chunk(*args)

    monkeypatch.setattr(reader, "read_chunk", slow_read_chunk)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            name, index = NAMES[rng.integers(len(NAMES))], int(rng.integers(NUM_IMAGES))
            right.append(np.array_equal(opened.read_row(MIXED, name, index), rows[name][index]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 160  # a thread that met an error adds fewer


def test_open_files_and_kept_blocks_are_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN", 2)
    monkeypatch.setattr(reader, "MAX_BLOCK_BYTES", 30)
    opened = CacheReader(cache)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(NUM_IMAGES):
        opened.read(MIXED, index, NAMES)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert sum(block.nbytes for block in opened._state.blocks.values()) <= 30
    opened.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("linked", ["views/mixed-0000/half/c/0/0/0", "views/mixed-0000/half", "views/mixed-0000"])
def test_links_are_not_followed(cache: Path, tmp_path: Path, linked: str) -> None:
    target = tmp_path / "elsewhere"
    (cache / linked).rename(target)
    (cache / linked).symlink_to(target)
    with pytest.raises(DamagedCacheError, match="a symbolic link"):
        CacheReader(cache).read_row(MIXED, "half", 0)
    assert not verify_cache(cache).ok


def test_a_pipe_in_place_of_a_shard_does_not_hang(cache: Path) -> None:
    path = cache / "views/mixed-0000/half/c/0/0/0"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedCacheError, match="not a regular file"):
        CacheReader(cache).read_row(MIXED, "half", 0)


def test_a_cache_reached_through_a_link_reads(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache)
    assert read_all(tmp_path / "link") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: inner(m).insert(1, {"name": "numcodecs.pickle"}), r"codec numcodecs\.pickle is not allowed"),
        (lambda m: m.update(codecs=[{"name": "os.system"}]), r"codec os\.system is not allowed; allowed: blosc, bytes"),
        (lambda m: m.update(data_type="object"), "data_type 'object' is not allowed"),
        (lambda m: m.update(data_type="float32"), "data_type is 'float32', the manifest declares 'float16'"),
        (
            lambda m: m.update(shape=[2**40, 2, 3]),
            r"shape is \[1099511627776, 2, 3\], the manifest declares \[7,",
        ),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[9, 2, 3]), "chunk_grid is"),
        (lambda m: inner(m).pop(), "codecs is"),
        (lambda m: m.update(storage_transformers=[{"name": "x"}]), "storage_transformers is"),
        (lambda m: m.update(must_know=True), "must_know is True"),
    ],
)
def test_hostile_array_metadata_is_refused_before_anything_is_read(cache: Path, change: Any, message: str) -> None:
    edit_json(cache / "views/mixed-0000/half/zarr.json", change)
    with pytest.raises(DamagedCacheError, match=f"half/zarr.json: {message}"):
        CacheReader(cache).read_row(MIXED, "half", 0)
    assert [fault.file for fault in verify_cache(cache).faults] == ["views/mixed-0000/half/zarr.json"]


def test_a_changed_list_of_files_is_an_error(cache: Path) -> None:
    path = cache / "views/mixed-0000/shards.json"
    good = path.read_bytes()
    edit_json(path, lambda content: content["files"][0].update(bytes=1))
    with pytest.raises(DamagedCacheError, match=r"shards\.json: sha256 does not match the manifest"):
        CacheReader(cache).read_row(MIXED, "half", 0)
    assert [fault.file for fault in verify_cache(cache).faults] == ["views/mixed-0000/shards.json"]
    path.write_bytes(good)
    edit_json(path, lambda content: content["files"][0].update(path="../../../etc/passwd"))
    manifest = open_seal(json.loads((cache / "manifest.json").read_bytes()))
    manifest["shards"]["mixed-0000"] = sha256(path.read_bytes())
    (cache / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(DamagedCacheError, match="the files listed are not those of the layout"):
        CacheReader(cache).read_row(MIXED, "half", 0)


def test_changed_data_and_teacher_arrays_are_errors(cache: Path) -> None:
    (cache / "data.json").write_bytes(b"{}")
    path = cache / "teacher/scale/c"
    path.write_bytes(with_checksum(np.array(9, "f2").tobytes()))
    with pytest.raises(DamagedCacheError, match=r"data\.json: sha256 does not match"):
        CacheReader(cache).read_data()
    with pytest.raises(DamagedCacheError, match=r"teacher/scale/c: sha256 does not match"):
        CacheReader(cache).read_teacher("scale")
    assert [fault.file for fault in verify_cache(cache).faults] == ["data.json", "teacher/scale/c"]


def test_what_is_no_cache_says_so(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no cache at .*nowhere; make one with `cache-kd extract"):
        CacheReader(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=r"is not a cache: it has no zarr\.json"):
        CacheReader(tmp_path)
    edit_json(cache / "zarr.json", lambda root: root["attributes"]["cache_kd"].update(format=2))
    with pytest.raises(MismatchError, match="cache format 2, this version reads 1; extract it again"):
        CacheReader(cache)


def test_reading_needs_no_zarr_python(cache: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['zarr'] = None\n"
        "from cache_kd.cache import CacheReader; from cache_kd.structures import View\n"
        f"CacheReader({str(cache)!r}).read(View('mixed', 0), 3, {NAMES!r})\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_reader_goes_on_while_the_cache_is_topped_up(cache: Path) -> None:
    opened = CacheReader(cache)
    opened.read(MIXED, 0, NAMES)
    write_views(cache, View("mixed", 1))
    assert np.array_equal(opened.read_row(MIXED, "half", 6), rows_of(SMALL, MIXED)["half"][6])
    assert CacheReader(cache).manifest.views == (MIXED, View("mixed", 1))


def test_shard_size_comes_from_the_manifest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_SAMPLES", 5)
    assert read_all(cache) == []
