"""Interrupted, resumed, topped up or disturbed: a cache holds the same bytes, or one line says what is wrong."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import (
    COUNT_OF_KILLS,
    ENVIRONMENT,
    GIVEN,
    MIXED,
    PLAIN,
    SMALL,
    arrays,
    open_writer,
    rows_of,
    write_views,
)

from cache_kd.cache import CacheReader, CacheWriter, files, read_manifest, verify_cache
from cache_kd.errors import (
    CacheKDError,
    DamagedCacheError,
    DiskSpaceError,
    InputDataError,
    MismatchError,
    SettingError,
)
from cache_kd.structures import Column, View

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def part(writer: CacheWriter, view: View, shard: int) -> dict[str, list[np.ndarray]]:
    return {name: [values[i] for i in writer.samples(shard)] for name, values in rows_of(SMALL, view).items()}


def test_killed_at_any_moment_it_goes_on_to_the_same_digest(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "kill_writer.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    killed, *digests = done.stdout.split()
    assert int(killed) >= COUNT_OF_KILLS
    assert len(digests) == int(killed) + 1
    assert len(set(digests)) == 1


def test_nothing_is_renamed_before_it_is_synced_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def noted_replace(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write_atomic(tmp_path / "a", b"1")
    assert events == ["file", "rename", "folder"]


def test_records_are_created_once(tmp_path: Path) -> None:
    assert files.create_only(tmp_path / "a", b"1")
    assert not files.create_only(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_records_work_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert files.create_only(tmp_path / "a", b"1")
    assert not files.create_only(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_topping_up_touches_no_old_file_and_equals_writing_in_one_go(tmp_path: Path) -> None:
    write_views(tmp_path / "steps", MIXED)
    before = snapshot(tmp_path / "steps")
    steps = write_views(tmp_path / "steps", View("mixed", 1), PLAIN)
    after = snapshot(tmp_path / "steps")
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    once = write_views(tmp_path / "once", PLAIN, View("mixed", 1), MIXED)
    assert steps.views == once.views == (MIXED, View("mixed", 1), PLAIN)
    assert steps.digest == once.digest
    assert steps.digest != read_digest(before)
    assert verify_cache(tmp_path / "steps").ok


def read_digest(files_of: dict[str, tuple[bytes, int]]) -> str:
    found = re.search(rb'"digest": "(\w+)"', files_of["manifest.json"][0])
    assert found
    return found[1].decode()


def test_digest_holds_identity_and_content_but_no_place_or_host(tmp_path: Path) -> None:
    first = write_views(tmp_path / "a", MIXED)
    with open_writer(tmp_path / "b") as writer:
        for shard in writer.units(MIXED):
            writer.write_unit(MIXED, shard, part(writer, MIXED, shard), {"host": "elsewhere"})
        second = writer.finish([MIXED], {**GIVEN, "environment": {"zarr": "9"}})
    assert first.digest == second.digest
    other = write_views(tmp_path / "c", MIXED, identity={"seed": 4})
    assert other.digest != first.digest
    with open_writer(tmp_path / "d") as writer:
        for shard in writer.units(MIXED):
            rows = part(writer, MIXED, shard)
            rows["features"][0] = rows["features"][0] + 1
            writer.write_unit(MIXED, shard, rows, ENVIRONMENT)
        assert writer.finish([MIXED], GIVEN).digest != first.digest


def test_another_identity_is_refused_naming_each_part(cache: Path) -> None:
    identity = {"teacher": {"sha256": "bb", "dtype": "fp32"}, "seed": 3, "recipe": "x"}
    expected = r'\(recipe: nothing there, "x" wanted; teacher\.sha256: "aa" there, "bb" wanted\)'
    with pytest.raises(MismatchError, match=expected):
        open_writer(cache, identity=identity)
    with pytest.raises(MismatchError, match=r"num_images: 7 there, 6 wanted"):
        open_writer(cache, num_images=6)
    with pytest.raises(MismatchError, match=r"data\.json differs: the ordered images"):
        open_writer(cache, data={"images": []})
    with pytest.raises(MismatchError, match=r"the teacher's array scale are not"):
        open_writer(cache, teacher_arrays={**arrays(), "scale": np.array(9, "f2")})


def test_a_refused_writer_leaves_the_cache_unlocked(cache: Path) -> None:
    with pytest.raises(MismatchError, match="something else"):
        open_writer(cache, identity={"seed": 4})
    open_writer(cache).close()


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(SettingError, match=r"other files \(for example photo\.jpg\)"):
        open_writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    with pytest.raises(SettingError, match="is a file"):
        open_writer(tmp_path / "photo.jpg")


def test_a_group_of_another_program_or_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(CacheKDError, match="no attribute cache_kd"):
        open_writer(tmp_path)
    (tmp_path / "zarr.json").write_text('{"attributes": {"cache_kd": {"format": 99}}}')
    with pytest.raises(MismatchError, match="cache format 99, this version reads 1"):
        open_writer(tmp_path)


def test_two_writers_get_one_clear_line(tmp_path: Path) -> None:
    first = open_writer(tmp_path / "cache")
    message = rf"^another extraction is writing .*cache: process {os.getpid()} on .*; wait"
    with pytest.raises(CacheKDError, match=message):
        open_writer(tmp_path / "cache")
    first.close()
    open_writer(tmp_path / "cache").close()


def test_the_lock_ends_with_the_process_even_if_its_children_live_on(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from cache_cases import open_writer\n"
        f"writer = open_writer(Path({str(tmp_path / 'cache')!r}))\n"
        "if os.fork() == 0:\n"
        "    print(os.getpid(), flush=True); time.sleep(30); os._exit(0)\n"
        "time.sleep(0.3); os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    try:
        assert parent.wait(timeout=30) == -9
        os.kill(child, 0)
        open_writer(tmp_path / "cache", num_images=7).close()
    finally:
        os.kill(child, 9)
        parent.stdout.close()


def test_finish_lists_missing_units_and_writes_no_manifest(tmp_path: Path) -> None:
    with open_writer(tmp_path / "cache") as writer:
        writer.write_unit(MIXED, 1, part(writer, MIXED, 1), ENVIRONMENT)
        with pytest.raises(DamagedCacheError, match="missing mixed-0000 shard 0, mixed-0000 shard 2; run the same"):
            writer.finish([MIXED], GIVEN)
    with pytest.raises(DamagedCacheError, match="unfinished cache; run the same `cache-kd extract` again"):
        CacheReader(tmp_path / "cache")


def test_a_damaged_unit_is_dropped_with_a_warning_and_redone(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = read_manifest(cache).digest
    shard = cache / "views/mixed-0000/features/c/1/0"
    for damage in (lambda: shard.unlink(), lambda: shard.write_bytes(b"short")):
        damage()
        with open_writer(cache) as writer, caplog.at_level(logging.WARNING):
            assert not writer.done(MIXED, 1)
            assert writer.done(MIXED, 0)
        assert re.search(r"mixed-0000 shard 1 is done again: .*features/c/1/0 (is missing|has 5 bytes)", caplog.text)
        caplog.clear()
        assert write_views(cache, MIXED).digest == digest


def test_a_torn_record_is_redone(cache: Path) -> None:
    digest = read_manifest(cache).digest
    (cache / "units/mixed-0000-00001.json").write_bytes(b'{"format": 1, "vi')
    with open_writer(cache) as writer:
        assert not writer.done(MIXED, 1)
    assert write_views(cache, MIXED).digest == digest


def test_a_finished_unit_written_again_stays_as_it_is(cache: Path) -> None:
    before = snapshot(cache)
    with open_writer(cache) as writer:
        record = writer.write_unit(MIXED, 0, part(writer, PLAIN, 0), {"host": "other"})
    assert record.environment == ENVIRONMENT
    assert snapshot(cache) == before


def test_leftovers_of_a_dead_writer_are_swept(cache: Path) -> None:
    leftover = cache / "views/mixed-0000/half/c/.tmp-0-12345"
    leftover.write_bytes(b"x")
    assert any("left behind" in note for note in verify_cache(cache).notes)
    open_writer(cache).close()
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop("half"), "rows of columns .*; expected features, half"),
        (lambda rows: rows["half"].pop(), r"column 'half': 2 rows, shard 1 has 3 samples"),
        (lambda rows: rows["half"].__setitem__(1, np.zeros((2, 2), "f2")), r"'half', sample 4: shape \(2, 2\)"),
        (lambda rows: rows["half"].__setitem__(1, np.zeros((2, 3), "f4")), "'half', sample 4: dtype f4, expected f2"),
        (lambda rows: rows["labels"].__setitem__(0, np.zeros(41, "u1")), "'labels', sample 3: shape .* at most 40"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path, change: Any, message: str) -> None:
    with open_writer(tmp_path / "cache") as writer:
        rows = part(writer, MIXED, 1)
        change(rows)
        with pytest.raises(InputDataError, match=message):
            writer.write_unit(MIXED, 1, rows, ENVIRONMENT)
    assert not (tmp_path / "cache/views").exists()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (Column("a", "f8", (2,)), "dtype 'f8'; allowed: u1, i1"),
        (Column("../a", "u1", (2,)), "a name has letters"),
        (Column("a", "u1", (0,)), "at least 1"),
        (Column("a", "f4", (2,), ragged=True), "ragged columns have dtype u1"),
        (Column("a", "u1", (2**31,)), "is over 1073741824 bytes"),
    ],
)
def test_impossible_columns_are_refused(tmp_path: Path, column: Column, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        open_writer(tmp_path / "cache", (column,))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, DiskSpaceError, r"^disk full while writing .*mixed-0000.*; free some space"),
        (errno.EROFS, CacheKDError, r"^cannot go on writing .*: Read-only file system$"),
    ],
)
def test_a_refusing_disk_is_one_line_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CacheKDError], message: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with open_writer(tmp_path / "cache") as writer:
        writer.write_unit(MIXED, 0, part(writer, MIXED, 0), ENVIRONMENT)
        monkeypatch.setattr(os, "fsync", refuse)
        files.make_folder(tmp_path / "cache/views/mixed-0000")
        with pytest.raises(kind, match=r"writing|creating"):
            writer.write_unit(MIXED, 1, part(writer, MIXED, 1), ENVIRONMENT)
        with pytest.raises(kind, match=message):
            files.write_atomic(tmp_path / "cache/views/mixed-0000/x", b"1")
    assert not files.find_leftovers(tmp_path)
