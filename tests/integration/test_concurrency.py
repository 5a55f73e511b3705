"""Readers, writers and more writers at once: nobody reads a wrong row, one writes, the others say who does."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_commands import COMMAND
from small_inputs import IMAGES, SHARD

from cache_kd.cache import layout, lock, reader
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.verify import verify_cache
from cache_kd.cache.writer import CacheWriter
from cache_kd.errors import CacheKDError
from cache_kd.pipeline.extraction import Extracted, ExtractSettings, extract
from cache_kd.structures import Column, HeadSpec, Tap, View

READERS = 8


def run(teacher: Path, data: Path, path: Path, mixed: int, plain: int = 0) -> Extracted:
    settings: dict[str, Any] = {"imgsz": 64, "batch": 2, "device": "cpu", "workers": 0}
    return extract(ExtractSettings(teacher, data=data, cache=path, views=mixed, plain_views=plain, **settings))


def row_hashes(cache: CacheReader) -> dict[str, str]:
    """Return a hash of every row of every column, by view, column and sample."""
    return {
        f"{view.name} {column} {index}": hashlib.sha256(cache.read_row(view, column, index).tobytes()).hexdigest()
        for view in cache.manifest.views
        for column in cache.layouts
        for index in range(len(cache))
    }


# -- readers during a top-up ----------------------------------------------------------------------------------------


def read_on(path: Path, expected: dict[str, str], number: int, stop: Any, answers: Any) -> None:
    """Read random rows until told to stop, opening the cache again and again; answer with counts and faults."""
    generator, rows, opened, views, faults = random.Random(number), 0, 0, set[int](), []
    first = CacheReader(path)  # with the manifest of before the top-up all the time
    while not stop.is_set() or rows < 100:
        cache = first if generator.random() < 0.5 else CacheReader(path)
        opened += cache is not first
        views.add(len(cache.manifest.views))
        for _ in range(20):
            view = generator.choice(cache.manifest.views)
            column, index = generator.choice(list(cache.layouts)), generator.randrange(len(cache))
            rows += 1
            try:
                found = hashlib.sha256(cache.read_row(view, column, index).tobytes()).hexdigest()
            except CacheKDError as error:
                faults.append(str(error))
                continue
            if found != expected[f"{view.name} {column} {index}"]:
                faults.append(f"{view.name} {column} {index}: another row")
        time.sleep(0.01)  # two cores are to serve the writer too
    answers.put((rows, opened, sorted(views), faults))


def test_eight_readers_see_right_rows_while_views_are_topped_up(
    teacher: Path, data_file: Path, tmp_path: Path, small_shards: None
) -> None:
    whole = run(teacher, data_file, tmp_path / "whole", 3, 1)
    expected = row_hashes(CacheReader(whole.path))
    path = run(teacher, data_file, tmp_path / "grown", 1).path
    context = multiprocessing.get_context("fork")
    stop, answers = context.Event(), context.Queue()
    readers = [
        context.Process(target=read_on, args=(path, expected, number, stop, answers)) for number in range(READERS)
    ]
    for process in readers:
        process.start()
    try:
        for mixed, plain in ((2, 0), (2, 1), (3, 1)):
            done = run(teacher, data_file, path, mixed, plain)
        time.sleep(0.5)
    finally:
        stop.set()
    found = [answers.get(timeout=60) for _ in readers]
    for process in readers:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert [faults for *_, faults in found] == [[]] * READERS
    assert all(rows >= 100 and opened for rows, opened, *_ in found)
    assert {1, 4} <= {count for _, _, views, _ in found for count in views}, "readers of before and of after"
    assert done.manifest.digest == whole.manifest.digest and verify_cache(path).ok


# -- two extractions ------------------------------------------------------------------------------------------------


def test_of_two_extractions_one_works_and_the_other_says_who(teacher: Path, data_file: Path, tmp_path: Path) -> None:
    arguments = [
        *COMMAND, "extract", "--teacher", str(teacher), "--data", str(data_file), "--imgsz=64", "--batch=2",
        "--device=cpu", "--workers=0", "--views=15", "--plain-views=0", "--json", "--cache",
    ]  # fmt: skip
    pair = [
        subprocess.Popen([*arguments, str(tmp_path / "cache")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200) for process in pair]
    codes = [process.returncode for process in pair]
    assert sorted(codes) == [0, 1], said
    worker, other = codes.index(0), codes.index(1)
    line = said[other][1].decode().splitlines()[-1]  # before it stand the lines that --json keeps off stdout
    holder = f"process {pair[worker].pid} on {os.uname().nodename}, since "
    assert line.startswith(f"cache-kd: another extraction is writing {tmp_path / 'cache'}: {holder}")
    assert line.endswith("wait for it to end, or stop it, and run this again") and b"Traceback" not in said[other][1]
    summary = json.loads(said[worker][0])
    assert summary["items_extracted"] == 15 * IMAGES
    again = subprocess.run([*arguments, str(tmp_path / "cache")], capture_output=True, check=True)
    assert json.loads(again.stdout)["digest"] == summary["digest"]
    assert json.loads(again.stdout)["items_extracted"] == 0
    assert verify_cache(tmp_path / "cache").ok


def claim(path: Path, **record: Any) -> Path:
    """Leave the record of another writer in the folder of a cache."""
    file = path / lock.HOLDER
    path.mkdir(exist_ok=True)
    file.write_text(json.dumps({"host": "far", "machine": "other", "pid": 7, "start": "then", **record}))
    return file


def test_another_machine_is_respected_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    """The kernel's lock is free here, as on a network mount that does not share it."""
    file = claim(tmp_path / "cache")
    with pytest.raises(CacheKDError, match=r"process 7 on far, since then, has its lock \(0 s ago it was at work; sil"):
        lock.lock_cache(tmp_path / "cache")
    moment = time.time() - lock.STALE_SECONDS + 60
    os.utime(file, (moment, moment))
    with pytest.raises(CacheKDError, match=r"\(54\d s ago it was at work; silent for 600 s, its lock is taken over\)"):
        lock.lock_cache(tmp_path / "cache")
    moment = time.time() - lock.STALE_SECONDS - 1
    os.utime(file, (moment, moment))
    held = lock.lock_cache(tmp_path / "cache")
    assert json.loads(file.read_text())["pid"] == os.getpid()
    held.release()
    assert not file.exists()


def test_a_dead_writer_of_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    held = lock.lock_cache(tmp_path)
    machine = json.loads((tmp_path / lock.HOLDER).read_text())["machine"]
    held.release()
    for text in (None, "torn {"):
        file = claim(tmp_path, machine=machine)
        if text:
            file.write_text(text)
            os.utime(file, (1, 1))
        lock.lock_cache(tmp_path).release()
        assert not file.exists()


def test_the_record_of_a_dead_writer_is_noted_and_replaced(
    teacher: Path, data_file: Path, tmp_path: Path, small_shards: None
) -> None:
    path = run(teacher, data_file, tmp_path / "cache", 1).path
    assert verify_cache(path).notes == ()
    machine = lock._machine()
    claim(path, machine=machine)
    report = verify_cache(path)
    assert report.ok
    assert report.notes == (".writer.json: a writer is at work, or one died; the next extraction replaces it",)
    run(teacher, data_file, path, 1)
    assert verify_cache(path).notes == ()


def test_a_writer_at_work_gives_signs_of_life_and_removes_only_its_own_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lock.lock_cache(tmp_path)
    file = tmp_path / lock.HOLDER
    os.utime(file, (1, 1))
    held.sign()
    assert file.stat().st_mtime == 1, "not at every batch"
    monkeypatch.setattr(lock, "_SIGN_SECONDS", 0.0)
    held.sign()
    assert time.time() - file.stat().st_mtime < 60
    other = claim(tmp_path).read_bytes()
    held.release()
    assert file.read_bytes() == other


def test_an_extraction_gives_a_sign_with_every_batch(
    teacher: Path, data_file: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[None] = []
    monkeypatch.setattr(lock.WriterLock, "sign", lambda self: signs.append(None))
    run(teacher, data_file, tmp_path / "cache", 1)
    assert len(signs) >= IMAGES // 2


# -- memory ---------------------------------------------------------------------------------------------------------

MEMORY = """
import json, random, sys
import psutil
from cache_kd.cache.reader import CacheReader

cache, process, generator = CacheReader(sys.argv[1]), psutil.Process(), random.Random(0)
resident, descriptors = [], []
for epoch in range(int(sys.argv[2])):
    for view in cache.manifest.views:
        for index in generator.sample(range(len(cache)), len(cache)):
            cache.read(view, index, [name for name in cache.layouts])
    resident.append(process.memory_info().rss)
    descriptors.append(process.num_fds())
print(json.dumps([resident, descriptors]))
"""


def many_shards(path: Path, views: int) -> CacheReader:
    """Write a cache of over 64 shard files without a teacher."""
    generator = np.random.default_rng(0)
    columns = (Column("features", "u1", (20_000,)), Column("half", "f2", (64,), whole=True))
    head = HeadSpec((Tap("P3", 8, 8),), 1, ("a",))
    every = [View("mixed", number) for number in range(views)]
    with CacheWriter.open_or_create(
        path, identity={"seed": 0}, data={"images": []}, columns=columns, num_images=4 * SHARD, teacher_arrays={}
    ) as writer:
        for view in every:
            for shard in writer.units(view):
                count = len(writer.samples(shard))
                rows = {
                    "features": [generator.integers(0, 9, 20_000, "u1") for _ in range(count)],
                    "half": [np.zeros(64, "f2") for _ in range(count)],
                }
                writer.write_unit(view, shard, rows, {})
        plain = {"teacher": {"sha256": "aa"}, "codec": {"fidelity": "exact"}, "recipe": {}, "environment": {}}
        writer.finish(every, {**plain, "head": head, "imgsz": 64, "seed": 0})
    return CacheReader(path)


def test_the_memory_of_a_reader_is_flat_over_fifty_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_SAMPLES", SHARD)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    cache = many_shards(tmp_path / "cache", views=12)
    assert sum(len(cache.files(view)) for view in cache.manifest.views) == 96 > reader.MAX_OPEN
    done = subprocess.run([sys.executable, "-c", MEMORY, str(cache.path), "50"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resident, descriptors = json.loads(done.stdout)
    growth = (max(resident[5:]) - resident[5]) / 1e6
    assert growth < 5, f"{growth:.1f} MB"
    assert max(descriptors) < reader.MAX_OPEN + 20
