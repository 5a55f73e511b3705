"""A full or read-only disk is one line, leaves nothing torn, and after some room is made the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_inputs import IMAGES, SHARD
from student_runs import gradients, results, resume, train_student

from cache_kd.cache import files
from cache_kd.cache.verify import verify_cache
from cache_kd.errors import CacheKDError, DiskSpaceError
from cache_kd.pipeline.extraction import Extracted, ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.ultralytics_bridge.trainer import DistillTrainer


@dataclass
class Disk:
    """A file system of its own where mounting is allowed; else the syncing of files refuses in its place."""

    path: Path
    mounted: bool
    refuses: int = 0

    def fill(self) -> None:
        if not self.mounted:
            self.refuses = errno.ENOSPC
            return
        with (self.path / "filler").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def free(self) -> None:
        self.refuses = 0
        (self.path / "filler").unlink(missing_ok=True)

    def forbid(self, forbidden: bool) -> None:
        """Make it read-only, or writable again."""
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,ro" if forbidden else "remount,rw", str(self.path)], check=True)
        self.refuses = errno.EROFS if forbidden and not self.mounted else 0


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "cache-kd-test", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    found = Disk(path, mounted)
    sync = os.fsync

    def refusing(descriptor: int) -> None:
        if found.refuses:
            raise OSError(found.refuses, os.strerror(found.refuses))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    try:
        yield found
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


def run(teacher: Path, data: Path, path: Path, progress: Any = None, mixed: int = 2) -> Extracted:
    settings = ExtractSettings(
        teacher, data=data, cache=path, views=mixed, plain_views=0, imgsz=64, batch=2, device="cpu", workers=0
    )
    return extract(settings, progress=progress)


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(
    teacher: Path, data_file: Path, tmp_path: Path, disk: Disk, small_shards: None
) -> None:
    whole = run(teacher, data_file, tmp_path / "whole")
    path = disk.path / "made" / "cache"
    with pytest.raises(DiskSpaceError, match=r"^disk full while (writing|creating) .*; free some space and run the sa"):
        run(teacher, data_file, path, lambda done, _: disk.fill() if done == 2 else None)
    disk.free()
    assert not (disk.path / "made").exists(), "no unit was written"
    with pytest.raises(DiskSpaceError, match=r"^disk full while (writing|creating) .*views/mixed-0000"):
        run(teacher, data_file, path, lambda done, _: disk.fill() if done == 6 else None)
    assert files.find_leftovers(path) == []
    disk.free()
    done = run(teacher, data_file, path)
    assert done.items == 2 * IMAGES - SHARD
    assert done.manifest.digest == whole.manifest.digest and verify_cache(path).ok


def test_a_read_only_cache_is_read_and_its_top_up_refused_in_one_line(
    teacher: Path, data_file: Path, disk: Disk, small_shards: None
) -> None:
    path = disk.path / "cache"
    digest = run(teacher, data_file, path, mixed=1).manifest.digest
    disk.forbid(True)
    with pytest.raises(CacheKDError, match=r"^cannot go on (locking|writing) .*: Read-only file system$"):
        run(teacher, data_file, path)
    assert Cache(path).read(0, 3).features and verify_cache(path).ok
    disk.forbid(False)
    assert json.loads((path / "manifest.json").read_text())["digest"] == digest
    assert len(run(teacher, data_file, path).manifest.views) == 2


@pytest.mark.slow
def test_a_training_on_a_full_disk_ends_with_one_line_and_is_resumed(few_cache: Path, disk: Disk) -> None:
    def fill(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        if trainer.epoch == 1:
            disk.fill()

    last = disk.path / "train" / "weights" / "last.pt"
    with pytest.raises(DiskSpaceError, match=rf"^disk full while writing .*; free some space and go on: .*={last}$"):
        train_student(few_cache, disk.path, "cwd", epochs=3, before_batch=fill)
    disk.free()
    resume(disk.path / "train")
    assert [row["epoch"] for row in results(disk.path / "train")] == ["1", "2", "3"]
    assert [row["epoch"] for row in gradients(disk.path / "train")] == ["1", "2", "3"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_exceeded_quota_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskSpaceError, match=r"^disk full while writing"):
        files.write_atomic(tmp_path / "a", b"1")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, interrupt)
            with pytest.raises(KeyboardInterrupt, match=r"^$"):
                files.write_atomic(tmp_path / "a", b"1")
        assert not list(tmp_path.iterdir())
