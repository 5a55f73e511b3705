"""An extraction in parts, in any order or at once, is the extraction in one go; units that fail are left out, said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from poison import ALARM, CRASH, KILL, poison, tried
from refusals import Refused, refused, work

from cache_kd.cache import lock
from cache_kd.cache.attempts import Attempts
from cache_kd.cache.places import open_store
from cache_kd.cache.removal import CacheRemoval
from cache_kd.cache.verify import verify_cache
from cache_kd.cache.writer import CacheWriter
from cache_kd.errors import AlarmError, CacheKDError, DamagedCacheError, MissingFileError, SettingError, UnitsError
from cache_kd.pipeline import preparation
from cache_kd.pipeline.extraction import Extracted, ExtractSettings, extract
from cache_kd.pipeline.finishing import finish
from cache_kd.pipeline.parts import Part
from cache_kd.structures import View
from cache_kd.teacher import extract as loop

VIEWS = 6
__all__ = ["refused", "work"]
COMMAND = (sys.executable, "-m", "cache_kd")


@pytest.fixture(scope="module")
def whole(teacher: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    return run(teacher, few, tmp_path_factory.mktemp("whole") / "cache")


def run(teacher: Path, data: Path, path: Path, part: str | None = None, **options: Any) -> Extracted:
    settings: dict[str, Any] = {"imgsz": 64, "batch": 2, "device": "cpu", "workers": 0, "threads": 1, **options}
    mixed = settings.pop("views", VIEWS - 1)
    chosen = Part.parse(part) if part else None
    return extract(ExtractSettings(teacher, data=data, cache=path, views=mixed, plain_views=1, part=chosen, **settings))


def words(teacher: Path, data: Path, path: Path, *more: str) -> list[str]:
    return [
        *COMMAND, "extract", "--teacher", str(teacher), "--data", str(data), "--cache", str(path), "--imgsz=64",
        "--batch=2", "--device=cpu", "--workers=0", "--threads=1", f"--views={VIEWS - 1}", "--json", *more,
    ]  # fmt: skip


# -- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(3, 1, 2), pytest.param((1, 2, 3), marks=pytest.mark.slow)])
def test_parts_in_any_order_are_the_whole(
    whole: Extracted, teacher: Path, few: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    path = tmp_path / "cache"
    for done, number in enumerate(order):
        made = run(teacher, few, path, f"{number}/3")
        assert made.items == 2 * 4 and made.missing == VIEWS - 2 * (done + 1)
        assert (made.manifest is None) == (done < 2) and (path / "manifest.json").exists() == (done == 2)
    assert made.manifest is not None and whole.manifest is not None
    assert made.manifest.digest == whole.manifest.digest
    assert made.manifest.to_json() == {**whole.manifest.to_json(), "teacher": made.manifest.teacher}
    report = verify_cache(path)
    assert report.ok and report.notes == ()
    assert {file.name for file in path.iterdir()} == {file.name for file in Path(str(whole.path)).iterdir()}


@pytest.mark.slow
def test_parts_at_once_are_the_whole(whole: Extracted, teacher: Path, few: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    parts = [
        subprocess.Popen(words(teacher, few, path, f"--part={number}/3"), stdout=subprocess.PIPE, text=True)
        for number in (1, 2, 2, 3)  # one of them twice
    ]
    said = [json.loads(part.communicate(timeout=240)[0]) for part in parts]
    assert [part.returncode for part in parts] == [0] * 4
    assert whole.manifest is not None
    assert {document["digest"] for document in said if "digest" in document} == {whole.manifest.digest}
    assert verify_cache(path).ok and not (path / "attempts").exists() and not (path / "extraction.json").exists()


def test_a_part_that_is_typed_again_does_nothing_again(teacher: Path, few: Path, tmp_path: Path) -> None:
    run(teacher, few, tmp_path / "cache", "1/2")
    assert run(teacher, few, tmp_path / "cache", "1/2").items == 0
    assert run(teacher, few, tmp_path / "cache").items == VIEWS // 2 * 4, "the whole does what is left"


def test_slurms_array_names_the_part(teacher: Path, few: Path, tmp_path: Path) -> None:
    slurm = {"ID": "12", "COUNT": "3", "MIN": "10", "MAX": "12", "STEP": "1"}
    given = {**os.environ, **{f"SLURM_ARRAY_TASK_{name}": value for name, value in slurm.items()}}
    done = subprocess.run(
        words(teacher, few, tmp_path / "cache"), env=given, capture_output=True, text=True, check=True, timeout=200
    )
    assert "part 3/3, by SLURM_ARRAY_TASK_ID=12, SLURM_ARRAY_TASK_COUNT=3" in done.stderr
    assert json.loads(done.stdout) == {
        "cache": str(tmp_path / "cache"),
        "complete": False,
        "units_missing": 4,
        "items_extracted": 8,
        "seconds": json.loads(done.stdout)["seconds"],
    }
    names = {file.name for file in (tmp_path / "cache" / "units").iterdir()}
    assert names == {"mixed-0002-00000.json", "plain-0000-00000.json"}


# -- finish ---------------------------------------------------------------------------------------------------------


def test_finish_says_what_is_missing_and_how_it_is_made(teacher: Path, few: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    run(teacher, few, path, "2/3")
    with pytest.raises(
        DamagedCacheError,
        match=r"unfinished, missing 4 of 6 units: mixed-0000 shard 0, mixed-0002 shard 0, .*; run the same "
        r"`cache-kd extract` --part 1/3 again \(and parts 3\)$",
    ):
        finish(path, say=print)
    assert not (path / "manifest.json").exists()


def test_finish_writes_the_manifest_without_the_teacher(
    whole: Extracted, teacher: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, killed = tmp_path / "cache", []

    def die(*_: Any) -> None:
        killed.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "finish", die)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            run(teacher, few, path)
    assert killed and not (path / "manifest.json").exists()
    monkeypatch.setattr(preparation, "load_teacher", die)
    said: list[str] = []
    done = finish(path, say=said.append)
    assert done.manifest is not None and whole.manifest is not None
    assert done.manifest.to_json() == {**whole.manifest.to_json(), "teacher": done.manifest.teacher}
    assert not (path / "extraction.json").exists() and verify_cache(path).ok
    again = finish(path, say=said.append)
    assert said == [f"{path} is complete; nothing to finish"] and again.manifest == done.manifest


def test_finish_refuses_what_is_no_extraction(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no cache at .*none; make one with `cache-kd extract"):
        finish(tmp_path / "none", say=print)


def test_finish_refuses_a_changed_plan(teacher: Path, few: Path, tmp_path: Path) -> None:
    run(teacher, few, tmp_path / "cache", "1/2")
    file = tmp_path / "cache" / "extraction.json"
    file.write_text(re.sub(r'"imgsz":\s*64', '"imgsz": 96', file.read_text()))
    with pytest.raises(DamagedCacheError, match=r"extraction.json cannot be read .*; the same `cache-kd extract` writ"):
        finish(tmp_path / "cache", say=print)
    run(teacher, few, tmp_path / "cache", "2/2")
    assert verify_cache(tmp_path / "cache").ok


# -- who may write beside whom ---------------------------------------------------------------------------------------


def test_parts_share_and_all_others_are_alone(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").touch()
    one, two = lock.share_cache(tmp_path), lock.share_cache(tmp_path)
    with pytest.raises(CacheKDError, match=rf"another extraction is writing .*: process {os.getpid()} on"):
        lock.lock_cache(tmp_path)
    one.release()
    with pytest.raises(CacheKDError, match="another extraction is writing"):
        lock.lock_cache(tmp_path)
    two.release()
    assert not list(tmp_path.glob(".part-*"))
    alone = lock.lock_cache(tmp_path)
    with pytest.raises(CacheKDError, match="another extraction is writing"):
        lock.share_cache(tmp_path)
    alone.release()


def test_a_part_on_another_machine_keeps_out_who_must_be_alone(tmp_path: Path) -> None:
    file = tmp_path / f"{lock.PART}7-ab.json"
    file.write_text(json.dumps({"host": "far", "machine": "other", "pid": 7, "start": "then"}))
    lock.share_cache(tmp_path).release()
    with pytest.raises(CacheKDError, match=r"process 7 on far, since then, has its lock \(\d s ago"):
        lock.lock_cache(tmp_path)
    os.utime(file, (1, 1))
    lock.lock_cache(tmp_path).release()
    assert not file.exists()


def test_a_cache_in_parts_is_not_deleted_under_them(teacher: Path, few: Path, tmp_path: Path) -> None:
    run(teacher, few, tmp_path / "cache", "1/2")
    held = lock.share_cache(tmp_path / "cache")
    with pytest.raises(CacheKDError, match="another extraction is writing"):
        CacheRemoval(tmp_path / "cache")
    held.release()
    with CacheRemoval(tmp_path / "cache") as removal:
        removal.delete()
    assert not (tmp_path / "cache").exists()


# -- attempts -------------------------------------------------------------------------------------------------------


def test_a_unit_whose_targets_are_worthless_is_quarantined_and_the_rest_done(
    whole: Extracted, teacher: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, module = tmp_path / "cache", poison(tmp_path, "mixed-0001", ALARM)
    before = loop.encode_views
    monkeypatch.setattr(loop, "encode_views", before)  # what the module patches is put back
    with pytest.raises(
        UnitsError,
        match=r"1 of 6 units are quarantined after 3 attempts: mixed-0001 shard 0 \(features of P3: 2 of 8 values are "
        r"not finite\); the rest is committed; to try them again, type the same with --retry$",
    ):
        run(teacher, few, path, imports=(module,))
    assert tried(tmp_path) == {"mixed-0001": 3, **dict.fromkeys(tried(tmp_path).keys() - {"mixed-0001"}, 2)}
    assert len(tried(tmp_path)) == VIEWS and len(list((path / "units").iterdir())) == VIEWS - 1
    monkeypatch.setattr(loop, "encode_views", before)
    with pytest.raises(UnitsError, match="1 of 1 units are quarantined"):
        run(teacher, few, path)
    with pytest.raises(DamagedCacheError, match=r"1 of them quarantined: mixed-0001 .* --retry again"):
        finish(path, say=print)
    done = run(teacher, few, path, retry=True)
    assert done.manifest is not None and whole.manifest is not None
    assert done.items == 4 and done.manifest.digest == whole.manifest.digest
    assert not (path / "attempts").exists() and verify_cache(path).notes == ()


def test_an_extraction_of_which_everything_fails_stops_early(
    teacher: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[None] = []

    def alarm(*_: Any, **__: Any) -> None:
        tries.append(None)
        raise AlarmError("nothing is finite")

    monkeypatch.setattr(loop, "encode_views", alarm)
    with pytest.raises(UnitsError, match=r"stopped, for the first 3 units failed: mixed-0000 shard 0 \(nothing is fi"):
        run(teacher, few, tmp_path / "cache")
    assert len(tries) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("what", "why"), [(KILL, r"process \d+ on .* did not end it"), (CRASH, "CUDA out of memory")])
def test_a_unit_that_ends_its_process_is_left_out_by_the_fourth(
    teacher: Path, few: Path, tmp_path: Path, what: str, why: str
) -> None:
    module = poison(tmp_path, "mixed-0004", what)
    start = words(teacher, few, tmp_path / "cache", f"--import={module}", "--part=1/1")
    for _ in range(3):
        assert subprocess.run(start, capture_output=True, timeout=200).returncode in (-9, 1)
    done = subprocess.run(start, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "1 of 2 units are quarantined after 3 attempts: mixed-0004 shard 0 (" in line
    assert re.search(why, line)
    assert tried(tmp_path) == {**dict.fromkeys(tried(tmp_path), 2), "mixed-0004": 3} and len(tried(tmp_path)) == VIEWS


def test_an_interrupt_counts_against_no_unit(teacher: Path, few: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    for _ in range(4):

        def interrupt(done: int, items: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            extract(
                ExtractSettings(
                    teacher, few, path, views=1, imgsz=64, batch=2, device="cpu", workers=0, part=Part(1, 1)
                ),
                progress=interrupt,
            )
        assert Attempts(open_store(path)).counted() == {}
    run(teacher, few, path, views=1)


def test_attempts_are_counted_in_the_store(tmp_path: Path) -> None:
    attempts, view = Attempts(open_store(tmp_path)), View("mixed", 3)
    assert [attempts.begin(view, 2) for _ in range(5)] == [1, 2, 3, None, None]
    attempts.fail(view, 2, "why")
    attempts.fail(view, 2, "or so")
    assert attempts.given_up() == {(view, 2): "why"}
    attempts.withdraw(view, 2, 3)
    assert attempts.counted() == {(view, 2): 2} and attempts.given_up() == {}
    attempts.clear(view, 2)
    assert not list((tmp_path / "attempts").iterdir())


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--part=0/3", "--part '0/3'; allowed: 1/16 to 16/16 for sixteen parts, for example 3/16"),
        ("--part=4/3", "--part '4/3'; allowed: 1/16 to 16/16"),
        ("--part=a/b", "--part 'a/b'; allowed: 1/16 to 16/16"),
        ("--part=3", "--part '3'; allowed: 1/16 to 16/16"),
        ("--processes=0", "--processes 0; allowed: 1 or more"),
        ("--threads=0", "--threads 0; allowed: 1 or more"),
        ("--device=0,1", r"--device 0: .*; allowed: cpu, or a device that torch sees"),
        ("--device=cpu,cpu", "--device cpu,cpu names a device twice; more on one device: --processes"),
        ("--engine=spark", "--engine 'spark'; known: local, ray"),
        ("--address=auto", "--address auto is that of a Ray cluster; add --engine ray"),
    ],
)
def test_bad_words_are_one_line(refused: Refused, few: Path, bccd_teacher: Path, option: str, says: str) -> None:
    line = refused("extract", "--teacher", str(bccd_teacher), "--data", str(few), option)
    assert re.search(says.replace("(", r"\("), line), line


def test_ray_and_parts_exclude_each_other(teacher: Path) -> None:
    with pytest.raises(SettingError, match=r"--part 1/2 with --engine ray: Ray gives out all units; leave one of them"):
        ExtractSettings(teacher, part=Part(1, 2), engine="ray")
    with pytest.raises(SettingError, match=r"--processes 1 for 2 devices; allowed: 2 or more"):
        ExtractSettings(teacher, device="cuda:0,cuda:1", processes=1)
