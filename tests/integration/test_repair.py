"""A damaged cache is repaired to the bytes that it had, or stays as it is and one line says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from small_inputs import build_model, save_model, small_data, without_times

from cache_kd.cache import layout
from cache_kd.cache import repair as cache_repair
from cache_kd.cache.lock import lock_cache
from cache_kd.cache.verify import verify_cache
from cache_kd.cli import main
from cache_kd.errors import CacheKDError, DamagedCacheError, MismatchError
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.repair import repair

IMAGES, SHARD = 7, 3
VIEW = "views/mixed-0001"


@pytest.fixture(autouse=True, scope="module")
def small_shards() -> Any:
    """Three shards a view, the last of one sample; nothing here outlives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_SAMPLES", SHARD)
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def data_file(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(test_data / "data" / "bccd", tmp_path_factory.mktemp("set"), train=IMAGES)


@pytest.fixture(scope="module")
def whole(teacher: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound cache of two mixed views, the second made with another batch size; no test may change it."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    for views, batch in ((1, 2), (2, 3)):
        extract(
            ExtractSettings(
                teacher, data_file, path, views=views, plain_views=0, imgsz=64, batch=batch, device="cpu", workers=0
            )
        )
    return path


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): without_times(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (".lock", ".writer.json")
    }


def differing(first: Path, second: Path) -> list[str]:
    """Return the files that are not equal in two folders."""
    one, other = contents(first), contents(second)
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def flip(file: Path, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def shard(path: Path, column: str, number: int = 1) -> Path:
    axes = "" if column.endswith("_length") else "/0" * (len(_shape(path, column)) - 1)
    return path / f"{VIEW}/{column}/c/{number}{axes}"


def _shape(path: Path, column: str) -> list[int]:
    return list(json.loads((path / VIEW / column / "zarr.json").read_text())["shape"])


def columns(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path / VIEW).iterdir() if folder.is_dir())


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def flip_every_column(path: Path) -> None:
    for column in columns(path):
        flip(shard(path, column))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit in every column": flip_every_column,
    "a missing shard": lambda path: shard(path, "features").unlink(),
    "a cut shard": lambda path: os.truncate(shard(path, "features", 2), 100),
    "two exchanged shards": lambda path: swap(shard(path, "features", 0), shard(path, "features", 1)),
    "a whole view": lambda path: shutil.rmtree(path / VIEW),
    "a unit record": lambda path: flip(path / "units/mixed-0001-00001.json"),
    "an array's metadata": lambda path: flip(path / VIEW / "features/zarr.json"),
    "a group's metadata": lambda path: (path / "views/zarr.json").unlink(),
    "the root": lambda path: flip(path / "zarr.json"),
    "a list of files": lambda path: flip(path / VIEW / "shards.json"),
    "a list of files and a record": lambda path: [
        flip(path / VIEW / "shards.json"),
        flip(path / "units/mixed-0001-00000.json"),
    ],
    "an array of the teacher": lambda path: flip(next((path / "teacher").rglob("c/**/0"))),
    "its metadata": lambda path: flip(next((path / "teacher").glob("*/zarr.json"))),
    "the list of images": lambda path: flip(path / "data.json"),
    "everything but manifest and records": lambda path: [
        file.unlink()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "manifest.json" and file.parent.name != "units"
    ],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_becomes_what_it_was(
    name: str, damaged: Path, whole: Path, teacher: Path, data_file: Path
) -> None:
    DAMAGES[name](damaged)
    lost = differing(damaged, whole)
    assert lost
    assert {fault.file for fault in verify_cache(damaged).faults} == set(lost)
    said: list[str] = []
    found = repair(damaged, teacher=teacher, data=data_file, say=said.append)
    assert found.ok
    assert f"{len(lost)} files repaired" in said[-1] and "as before" in said[-1]
    assert differing(damaged, whole) == []


def test_without_records_units_are_made_as_the_manifest_says(teacher: Path, data_file: Path, tmp_path: Path) -> None:
    """The batch size of a unit stands in its record; where all are lost, the manifest knows that of the last ones."""
    made = ExtractSettings(
        teacher, data_file, tmp_path / "one", views=1, plain_views=0, imgsz=64, batch=3, device="cpu", workers=0
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ultralytics leaves a process that trained in it
    try:
        extract(made)
    finally:
        torch.set_num_threads(before)
    lost = Path(shutil.copytree(made.cache or "", tmp_path / "lost"))
    shutil.rmtree(lost / "units")
    assert repair(lost, teacher=teacher, data=data_file, say=print).ok
    assert differing(lost, tmp_path / "one") == []
    assert json.loads((lost / "units/mixed-0000-00000.json").read_text())["environment"]["batch"] == 3


def test_a_sound_cache_has_nothing_to_repair(whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    said: list[str] = []
    assert repair(whole, teacher=tmp_path / "never-loaded.pt", say=said.append).ok
    assert said == [f"{whole}: nothing to repair"]
    assert contents(whole) == before


def test_without_the_teacher_only_what_the_cache_tells_is_put_back(damaged: Path, whole: Path) -> None:
    flip(shard(damaged, "features"))
    flip(damaged / VIEW / "features/zarr.json")
    flip(damaged / VIEW / "shards.json")
    said: list[str] = []
    found = repair(damaged, say=said.append)
    assert not found.ok
    assert "2 files repaired" in said[-1]
    assert f"1 files need the teacher: cache-kd verify {damaged} --repair --teacher best.pt" in said[-1]
    assert differing(damaged, whole) == [f"{VIEW}/features/c/1/0"]


# -- refused ----------------------------------------------------------------------------------------------------------


def refuse(damaged: Path, message: str, kind: type[Exception] = MismatchError, **options: Any) -> None:
    """Repair must end with this message and change nothing."""
    before = contents(damaged)
    with pytest.raises(kind, match=message):
        repair(damaged, say=print, **options)
    assert contents(damaged) == before


def test_another_teacher_is_refused(damaged: Path, data_file: Path, tmp_path: Path) -> None:
    flip(shard(damaged, "features"))
    flip(damaged / "views/zarr.json")
    other = save_model(build_model("yolov8n.yaml", seed=4), tmp_path / "other.pt")
    message = (
        r"cannot be repaired with these: teacher\S* .* there, .* wanted; give the teacher, .*; nothing was changed"
    )
    refuse(damaged, message, teacher=other, data=data_file)


def test_another_data_set_is_refused(damaged: Path, teacher: Path, data_file: Path, tmp_path: Path) -> None:
    flip(shard(damaged, "features"))
    moved = Path(shutil.copytree(data_file.parent, tmp_path / "set")) / data_file.name
    label = sorted((moved.parent / "labels/train").iterdir())[2]
    label.write_text("0 0.5 0.5 0.2 0.2\n")
    refuse(damaged, r"cannot be repaired with these: data\.labels: .* there, .* wanted", teacher=teacher, data=moved)


def test_a_moved_data_set_will_do(damaged: Path, whole: Path, teacher: Path, data_file: Path, tmp_path: Path) -> None:
    flip(shard(damaged, "features"))
    flip(damaged / "data.json")
    moved = Path(shutil.copytree(data_file.parent, tmp_path / "elsewhere")) / data_file.name
    assert repair(damaged, teacher=teacher, data=moved, say=print).ok
    assert differing(damaged, whole) == []


def test_a_machine_that_makes_other_bytes_changes_no_unit(
    damaged: Path, teacher: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit alone is damaged, and the machine rounds otherwise: nothing of it may be written."""
    from cache_kd.pipeline import preparation
    from cache_kd.ultralytics_bridge.teacher import Teacher

    flip(shard(damaged, "features"))
    (damaged / "units/mixed-0001-00001.json").unlink()
    stock, environment = Teacher.__call__, preparation.environment

    def off(self: Teacher, views: list[Any], *, batch: int) -> Any:
        from dataclasses import replace

        said = stock(self, views, batch=batch)
        return [replace(one, features=tuple(level * 1.01 for level in one.features)) for one in said]

    monkeypatch.setattr(Teacher, "__call__", off)
    monkeypatch.setattr(
        preparation, "environment", lambda **given: {**environment(**given), "accelerator": "elsewhere"}
    )
    message = (
        r"mixed-0001 shard 1: made again, .*features/c/1/0.* differ; accelerator: .* there, \"elsewhere\" wanted; "
        r"the unit is left as it was: repair it on a machine like the first, or extract another cache"
    )
    refuse(damaged, message, teacher=teacher, data=data_file)


def test_renamed_images_cannot_give_back_the_list_of_images(
    damaged: Path, teacher: Path, data_file: Path, tmp_path: Path
) -> None:
    flip(damaged / "data.json")
    moved = Path(shutil.copytree(data_file.parent, tmp_path / "set")) / data_file.name
    for kind in ("images", "labels"):
        first = min((moved.parent / kind / "train").iterdir())
        first.rename(first.with_stem(first.stem + "a"))
    refuse(damaged, r"data\.json: made again it differs .*were images renamed\?", teacher=teacher, data=moved)


def test_a_writer_at_work_is_left_alone(damaged: Path, teacher: Path, data_file: Path) -> None:
    flip(shard(damaged, "features"))
    lock = lock_cache(damaged)
    try:
        refuse(damaged, "another extraction is writing", CacheKDError, teacher=teacher, data=data_file)
    finally:
        lock.release()
    assert repair(damaged, teacher=teacher, data=data_file, say=print).ok


def test_a_link_is_not_followed(damaged: Path, teacher: Path, data_file: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (damaged / VIEW / "features").rename(outside)
    (damaged / VIEW / "features").symlink_to(outside)
    flip(outside / "c/1/0")
    before = contents(outside)
    with pytest.raises(DamagedCacheError, match="features is a symbolic link, which is never followed; remove it"):
        repair(damaged, teacher=teacher, data=data_file, say=print)
    assert contents(outside) == before


def test_a_list_that_nothing_tells_of_is_refused(damaged: Path, teacher: Path, data_file: Path) -> None:
    """List of files, a record and a shard of one view are lost: what the shard was nobody knows any more."""
    flip(damaged / VIEW / "shards.json")
    (damaged / "units/mixed-0001-00001.json").unlink()
    flip(shard(damaged, "features"))
    message = r"shards\.json: sha256 does not match .*run the same `cache-kd extract` again"
    refuse(damaged, message, DamagedCacheError, teacher=teacher, data=data_file)


# -- the manifest itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip, os.unlink])
def test_a_damaged_manifest_is_written_again_by_the_extraction(
    damaged: Path, whole: Path, teacher: Path, data_file: Path, damage: Callable[[Path], None]
) -> None:
    damage(damaged / "manifest.json")
    refuse(damaged, r"manifest\.json: .*`cache-kd extract`", CacheKDError, teacher=teacher, data=data_file)
    done = extract(
        ExtractSettings(teacher, data_file, damaged, views=2, plain_views=0, imgsz=64, batch=3, device="cpu", workers=0)
    )
    assert done.items == 0
    assert [name for name in differing(damaged, whole) if name != "manifest.json"] == []
    assert done.manifest.digest == json.loads((whole / "manifest.json").read_text())["digest"]
    assert verify_cache(damaged).ok


# -- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes", [1, 4])
def test_an_interrupted_repair_leaves_old_damage_or_right_files_only(
    damaged: Path, whole: Path, teacher: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    flip_every_column(damaged)
    flip(damaged / VIEW / "features/zarr.json")
    flip(damaged / "units/mixed-0001-00000.json")
    before, good = contents(damaged), contents(whole)
    done = 0
    write = cache_repair.write_atomic

    def until(path: Path, content: bytes) -> None:
        nonlocal done
        if done == writes:
            (path.parent / f".tmp-{path.name}-1").write_bytes(content[:10])  # as a kill in the middle of it leaves it
            raise KeyboardInterrupt
        done += 1
        write(path, content)

    monkeypatch.setattr(cache_repair, "write_atomic", until)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        repair(damaged, teacher=teacher, data=data_file, say=print)
    monkeypatch.undo()
    monkeypatch.setattr(layout, "MAX_SAMPLES", SHARD)
    after = {name: content for name, content in contents(damaged).items() if ".tmp-" not in name}
    right = [name for name in after if after[name] == good[name] != before[name]]
    assert len(right) == writes
    assert all(content in (before[name], good[name]) for name, content in after.items())
    assert {fault.file for fault in verify_cache(damaged).faults} == {n for n in after if after[n] != good[n]}
    assert repair(damaged, teacher=teacher, data=data_file, say=print).ok
    assert differing(damaged, whole) == []


# -- the command ------------------------------------------------------------------------------------------------------


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_names_what_is_damaged_then_repairs_it(damaged: Path, teacher: Path, data_file: Path) -> None:
    flip(shard(damaged, "features"))
    found = run("verify", damaged, "--jobs", "2")
    assert found.exit_code == 1
    assert f"{VIEW}/features/c/1/0: crc32c does not match (view mixed-0001, sample " in found.stdout
    assert f"cache-kd verify {damaged} --repair --teacher best.pt" in found.stdout
    mended = run("verify", damaged, "--repair", "--teacher", teacher, "--data", data_file)
    assert mended.exit_code == 0, mended.output
    assert "1 files repaired" in mended.stdout and "everything is whole" in mended.stdout
    again = run("verify", damaged, "--repair", "--teacher", teacher, "--data", data_file, "--json")
    assert json.loads(again.stdout)["ok"] is True
    assert "nothing to repair" in again.stderr


def test_a_share_is_read_and_the_rest_is_named(damaged: Path) -> None:
    whole = run("verify", damaged, "--json")
    files = json.loads(whole.stdout)["files"]
    found = json.loads(run("verify", damaged, "--json", "--fraction", "0.25").stdout)
    assert (found["files"], found["left_out"]) == (round(files / 4), files - round(files / 4))
    assert f"{found['left_out']} more files were only measured" in run("verify", damaged, "--fraction", "0.25").stdout


@pytest.mark.parametrize("option", [["--pixels"], ["--fraction", "0.5"]])
def test_options_that_do_not_go_with_repair_are_refused(damaged: Path, option: list[str]) -> None:
    done = run("verify", damaged, "--repair", *option)
    assert done.exit_code == 2
    assert "--repair reads every file and no pixels" in done.stderr
