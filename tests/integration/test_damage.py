"""No damage is silent: of random bit flips and lost, cut or exchanged files, each is reported with the file's name.

The rule: every byte of a shard file, of `data.json`, `shards.json` and the teacher's arrays is under a checksum. Of the
other JSON files the content is: what a parser reads must be what was written, only spaces and line ends outside of
strings may differ, and no flip of one bit turns one of those into another. So a flip anywhere must be reported.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_inputs import build_model, save_model

from cache_kd.cache import layout
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.shard_faults import Fault
from cache_kd.cache.verify import verify_cache
from cache_kd.cli import main
from cache_kd.errors import CacheKDError
from cache_kd.pipeline.extraction import ExtractSettings, extract

SHARD = 5
TRAINING = ["epochs=1", "batch=4", "close_mosaic=0", "val=False", "plots=False", "device=cpu"]


@pytest.fixture(scope="module")
def whole(few_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound cache of twelve images, three shards a view, one mixed view and a plain one."""
    folder = tmp_path_factory.mktemp("damage")
    teacher = save_model(build_model("yolov8n.yaml", seed=3), folder / "best.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_SAMPLES", SHARD)
        extract(
            ExtractSettings(
                teacher, few_images, folder / "cache", views=1, plain_views=1, imgsz=64, device="cpu", workers=0
            )
        )
    return folder / "cache"


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def read_everything(path: Path) -> dict[str, bytes]:
    """Read all rows of all views, the images and the teacher's arrays, as any training may; returns their bytes."""
    reader = CacheReader(path)
    found = {"data": str(reader.read_data()).encode(), "manifest": str(reader.manifest).encode()}
    found.update({name: reader.read_teacher(name).tobytes() for name in reader.manifest.arrays})
    for view in reader.manifest.views:
        for column in reader.layouts:
            rows = [reader.read_row(view, column, index) for index in range(len(reader))]
            found[f"{view.name}/{column}"] = b"".join(np.ascontiguousarray(row).tobytes() for row in rows)
    reader.close()
    return found


def reported(path: Path) -> list[Fault]:
    """Return what verification reports; an error that ends it names a file too."""
    try:
        return list(verify_cache(path).faults)
    except CacheKDError as error:
        return [Fault(name, str(error)) for name in ("manifest.json", "zarr.json") if f"/{name}" in str(error)][:1] or [
            Fault("manifest.json", str(error))
        ][: "no manifest.json" in str(error)]


def check_reported(path: Path, damaged: set[str], sound: dict[str, bytes]) -> None:
    """Verification must name exactly these files, with view and samples of a shard; reading must not go on with any."""
    faults = reported(path)
    assert {fault.file for fault in faults} == damaged
    for fault in faults:
        if "/c/" in fault.file and fault.file.startswith("views/"):
            assert fault.view == fault.file.split("/")[1] and fault.samples is not None
    touched = [file for file in damaged if is_read(file)]
    if not touched:
        assert read_everything(path) == sound
        return
    with pytest.raises(CacheKDError, match=r"^[^\n]+$") as error:
        read_everything(path)
    message = str(error.value)
    assert any(f"{path}/{file}" in message or f"no {file}" in message for file in touched), message
    assert "`cache-kd verify" in message or "cache-kd extract`" in message, message


def is_read(file: str) -> bool:
    """Return whether reader and training look at this file.

    Unit records are for verification and the next writer, metadata of groups and of the teacher for other programs.
    """
    of_an_array = file.startswith("views/") and file.count("/") == 3
    return not file.startswith("units/") and (not file.endswith("/zarr.json") or of_an_array)


def kind_of(file: str) -> str:
    """Return what sort of file this is; damage is spread over the sorts evenly."""
    if file.startswith("views/") and "/c/" in file:
        return file.split("/")[2]
    return "/".join(part for part in file.split("/")[:1] + file.split("/")[-1:] if not part[0].isdigit())


def files_by_kind(path: Path) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and file.name not in (".lock", ".writer.json"):
            kinds.setdefault("unit" if name.startswith("units/") else kind_of(name), []).append(name)
    return kinds


@contextmanager
def put_back(*files: Path) -> Iterator[None]:
    """Give the files back their content afterwards."""
    contents = [file.read_bytes() for file in files]
    try:
        yield
    finally:
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)


def flip(file: Path, rng: random.Random) -> None:
    """Flip one bit; of every second shard one in its last bytes, where index and checksums are."""
    content = bytearray(file.read_bytes())
    low = max(0, len(content) - SHARD * 16 - 8) if "/c/" in file.as_posix() and rng.random() < 0.5 else 0
    content[rng.randrange(low, len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def check_flips(path: Path, count: int, seed: int) -> None:
    rng, sound, kinds = random.Random(seed), read_everything(path), files_by_kind(path)
    for number in range(count):
        name = rng.choice(kinds[sorted(kinds)[number % len(kinds)]])
        with put_back(path / name):
            flip(path / name, rng)
            check_reported(path, {name}, sound)


def check_lost(path: Path, count: int, seed: int) -> None:
    """A third of the files is missing, a third cut, a third exchanged with another of the same column."""
    rng, sound, kinds = random.Random(seed), read_everything(path), files_by_kind(path)
    shards = {kind: files for kind, files in kinds.items() if "/c/" in files[0] and files[0].startswith("views/")}
    for number in range(count):
        name = rng.choice(kinds[sorted(kinds)[number // 3 % len(kinds)]])
        first, second = rng.sample(shards[sorted(shards)[number // 3 % len(shards)]], 2)
        with put_back(path / name, path / first, path / second):
            if number % 3 == 0:
                (path / name).unlink()
                check_reported(path, {name}, sound)
            elif number % 3 == 1:
                os.truncate(path / name, rng.randrange((path / name).stat().st_size))
                check_reported(path, {name}, sound)
            elif (path / first).read_bytes() != (path / second).read_bytes():
                exchange(path / first, path / second)
                check_reported(path, {first, second}, sound)


def exchange(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_no_flipped_bit_is_silent(cache: Path) -> None:
    check_flips(cache, 40, seed=0)


def test_no_lost_file_is_silent(cache: Path) -> None:
    check_lost(cache, 15, seed=0)


@pytest.mark.slow
def test_none_of_200_flipped_bits_is_silent(cache: Path) -> None:
    check_flips(cache, 200, seed=1)


@pytest.mark.slow
def test_none_of_50_lost_files_is_silent(cache: Path) -> None:
    check_lost(cache, 50, seed=1)


# -- training ---------------------------------------------------------------------------------------------------------


def exchange_shards(path: Path) -> str:
    folder = path / "views/mixed-0000/features/c"
    exchange(folder / "0/0", folder / "1/0")
    return "views/mixed-0000/features/c/"


def flip_in(name: str) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        file = next(iter(sorted(path.glob(name))))
        flip(file, random.Random(name))
        return file.relative_to(path).as_posix()

    return damage


def lose(name: str) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        (path / name).unlink()
        return name

    return damage


def cut(name: str) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        os.truncate(path / name, 50)
        return name

    return damage


MIXED = "views/mixed-0000"
QUICK: dict[str, Callable[[Path], str]] = {
    "a bit of a shard": flip_in(f"{MIXED}/features/c/1/0"),
    "a bit of the manifest": flip_in("manifest.json"),
}
LONG: dict[str, Callable[[Path], str]] = {
    "a bit of a table": flip_in(f"{MIXED}/feature_*/c/0/**/0"),
    "a bit of the pixel hashes": flip_in(f"{MIXED}/pixel_hash/c/2/0"),
    "a bit of the list of files": flip_in(f"{MIXED}/shards.json"),
    "a bit of an array's metadata": flip_in(f"{MIXED}/features/zarr.json"),
    "a bit of the root": flip_in("zarr.json"),
    "a bit of the list of images": flip_in("data.json"),
    "a missing shard": lose(f"{MIXED}/features/c/2/0"),
    "a cut shard": cut(f"{MIXED}/features/c/0/0"),
    "exchanged shards": exchange_shards,
}


def check_training(cache: Path, damage: Callable[[Path], str], project: Path, workers: int = 0) -> None:
    file = damage(cache)
    words = ["train", "--student", "yolov8n.yaml", "--cache", str(cache), "--loss", "cwd", "--loss", "ld", *TRAINING]
    done = CliRunner().invoke(main, [*words, f"project={project}", f"workers={workers}"])
    assert done.exit_code == 1, done.output
    lines = done.stderr.splitlines()
    line = next(line for line in lines if line.startswith("cache-kd: "))
    assert f"{cache}/{file}" in line
    assert f"`cache-kd verify {cache}" in line or "cache-kd extract`" in line
    assert "Traceback" not in done.output


@pytest.mark.parametrize("name", QUICK)
def test_training_ends_at_what_is_damaged(name: str, cache: Path, tmp_path: Path) -> None:
    check_training(cache, QUICK[name], tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_training_ends_at_whatever_is_damaged(name: str, cache: Path, tmp_path: Path) -> None:
    check_training(cache, LONG[name], tmp_path / "runs")


@pytest.mark.slow
def test_training_ends_at_what_a_worker_finds(cache: Path, tmp_path: Path) -> None:
    check_training(cache, QUICK["a bit of a shard"], tmp_path / "runs", workers=2)
