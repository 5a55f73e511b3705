"""Random rows and random faults: reading gives the right row or one line, and any manifest is read whole or refused."""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import GIVEN, MIXED, open_writer, row, write_views
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_kd.cache import CacheReader, read_manifest, verify_cache
from cache_kd.cache.files import open_seal, parse_json, seal
from cache_kd.cache.layout import layouts
from cache_kd.errors import CacheKDError, DamagedCacheError, MismatchError
from cache_kd.structures import Column

SLOW_FIXTURE = [HealthCheck.function_scoped_fixture]
SHAPES = st.lists(st.integers(1, 4), max_size=2).map(tuple)


# -- round trips with faults between ----------------------------------------------------------------------------------


@st.composite
def column_sets(draw: st.DrawFn) -> tuple[Column, ...]:
    """One to three columns of any sort, with names of their own."""
    kinds = draw(st.lists(st.sampled_from(["ragged", "plain"]), min_size=1, max_size=3))
    found = []
    for number, kind in enumerate(kinds):
        whole = draw(st.booleans())
        if kind == "ragged":
            found.append(Column(f"c{number}", "u1", (draw(st.integers(1, 20)),), ragged=True, whole=whole))
        else:
            dtype = draw(st.sampled_from(["u1", "f2", "i4", "f4"]))
            found.append(Column(f"c{number}", dtype, draw(SHAPES), whole=whole))
    return tuple(found)


def write(path: Path, columns: tuple[Column, ...], images: int, seed: int) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    rows = {column.name: [row(column, rng) for _ in range(images)] for column in columns}
    with open_writer(path, columns, num_images=images) as writer:
        for shard in writer.units(MIXED):
            part = {name: [values[i] for i in writer.samples(shard)] for name, values in rows.items()}
            writer.write_unit(MIXED, shard, part, {})
        writer.finish([MIXED], GIVEN)
    return rows


def damage(files: list[Path], kind: str, draws: random.Random) -> None:
    """Flip a bit of, cut, lengthen or lose one file, or exchange two."""
    file = draws.choice(files)
    content = file.read_bytes()
    if kind == "exchange":
        other = draws.choice(files)
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "lose":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: draws.randrange(len(content))])
    elif kind == "lengthen":
        file.write_bytes(content + bytes(draws.randrange(1, 9)))
    else:
        at = draws.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << draws.randrange(8)]) + content[at + 1 :])


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW_FIXTURE)
@given(
    column_sets(),
    st.integers(1, 8),
    st.lists(st.sampled_from(["flip", "cut", "lengthen", "lose", "exchange"]), min_size=1, max_size=3),
    st.integers(0, 2**32),
)
def test_rows_of_a_damaged_cache_are_right_or_refused(
    columns: tuple[Column, ...], images: int, kinds: list[str], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache")
        rows = write(path, columns, images, seed)
        shards = sorted(file for file in path.glob("views/*/*/c/**/*") if file.is_file())
        sound = {file: file.read_bytes() for file in shards}
        for kind in kinds:
            there = [file for file in shards if file.exists() and file.stat().st_size]
            if there:
                damage(there, kind, random.Random(seed))
        changed = {file for file in shards if not file.exists() or file.read_bytes() != sound[file]}
        report = verify_cache(path, jobs=2)
        assert {path / fault.file for fault in report.faults} == changed
        spoilt = {(f.file.split("/")[2], n) for f in report.faults for n in range(f.samples[0], f.samples[1] + 1)}
        reader = CacheReader(path)
        for column in columns:
            for index, expected in enumerate(rows[column.name]):
                try:
                    assert reader.read_row(MIXED, column.name, index).tobytes() == expected.tobytes()
                except DamagedCacheError as error:
                    assert any(str(file) in str(error) for file in changed)
                else:
                    assert (column.name, index) not in spoilt, "verification says more than reading needs"


@settings(max_examples=15, deadline=None, suppress_health_check=SLOW_FIXTURE)
@given(st.integers(0, 2**32), st.sampled_from(["flip", "cut", "lose", "lengthen"]))
def test_a_writer_between_faults_ends_at_the_same_digest(seed: int, kind: str) -> None:
    """Unit records and files are damaged between two runs: the next one makes good what it can see, to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache")
        digest = write_views(path, MIXED).digest
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        damage([*sorted(path.glob("units/*.json")), path / "manifest.json"], kind, random.Random(seed))
        assert write_views(path, MIXED).digest == digest
        assert verify_cache(path).ok
        records = {file for file in before if file.parent.name == "units"}  # they count how often they were made
        assert all(file.read_bytes() == content for file, content in before.items() if file not in records)


# -- checksums of JSON ------------------------------------------------------------------------------------------------


def test_no_flip_of_one_bit_of_a_sealed_file_is_taken(cache: Path) -> None:
    """Every bit of a unit record and of the manifest, spaces and line ends too."""
    for name in ("units/mixed-0000-00001.json", "manifest.json"):
        content = (cache / name).read_bytes()
        open_seal(parse_json(content, Path(name)))
        for at in range(len(content)):
            for bit in range(8):
                changed = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
                with pytest.raises(DamagedCacheError, match=r"^[^\n]+$"):
                    open_seal(parse_json(changed, Path(name)))


def test_other_spaces_are_the_same_content(cache: Path) -> None:
    manifest = read_manifest(cache)
    content = json.loads((cache / "manifest.json").read_bytes())
    (cache / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(cache) == manifest
    assert verify_cache(cache).ok


# -- a fuzz of the manifest -------------------------------------------------------------------------------------------


ODD: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**200, 1e308, -0.5, "", "x", "../../x", "\x00", "\ud800", "a" * 5000, [], {},
    [[]], {"": 0}, ["mixed-0000"] * 3, list(range(500)), {"format": 1},
]  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested tables and lists."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutate(content: dict[str, Any], draws: random.Random) -> dict[str, Any]:
    """Return a copy with one to three values replaced, removed, renamed, doubled or wrapped."""
    content = copy.deepcopy(content)
    for _ in range(draws.randint(1, 3)):
        *way, key = draws.choice(list(places(content)))
        table: Any = content
        for step in way:
            table = table[step]
        kind = draws.randrange(5)
        if kind == 0:
            table[key] = copy.deepcopy(draws.choice(ODD))
        elif kind == 1:
            del table[key]
        elif kind == 2 and isinstance(table, dict):
            table[draws.choice(["x", "", "format", str(key) + "s"])] = table.pop(key)
        elif kind == 3 and isinstance(table, list):
            table.append(copy.deepcopy(table[key]))
        else:
            table[key] = [table[key]] * draws.randint(1, 3)
        if not content:
            return content
    return content


def read_or_refuse(path: Path) -> None:
    """A manifest must be read, with whatever follows from it, or refused in one line, soon and in little memory."""
    started = time.perf_counter()
    try:
        manifest = read_manifest(path)
        layouts(manifest.columns, manifest.num_images, manifest.shard_size)
        reader = CacheReader(path)
        for view in manifest.views:
            reader.files(view)
    except (DamagedCacheError, MismatchError) as error:
        assert "\n" not in str(error) and len(str(error)) < 20_000
    assert time.perf_counter() - started < 1.0
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.reset_peak()


@pytest.fixture
def traced_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced_memory")
@pytest.mark.parametrize("start", range(0, 400, 100))
def test_any_manifest_is_read_or_refused_in_one_line(cache: Path, start: int) -> None:
    """Well sealed, as a hostile one would be, so that every value is looked at."""
    content = open_seal(json.loads((cache / "manifest.json").read_bytes()))
    for seed in range(start, start + 100):
        changed = mutate(content, random.Random(seed))
        try:
            (cache / "manifest.json").write_bytes(seal(changed))
        except ValueError:  # a half surrogate cannot be written as ours are, yet it may be spelt \ud800
            (cache / "manifest.json").write_text(json.dumps(changed))
        read_or_refuse(cache)


@pytest.mark.usefixtures("traced_memory")
def test_any_text_for_a_manifest_is_read_or_refused_in_one_line(cache: Path) -> None:
    """Bytes cut out, repeated, exchanged or replaced anywhere, numbers and nesting without end."""
    content = (cache / "manifest.json").read_bytes()
    draws = random.Random(0)
    texts = [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 100_000,
        b'{"format":1e999}',
        b'{"format": "\\ud800"}',
        b"\xef\xbb\xbf{}",
    ]
    for _ in range(150):
        low, high = sorted(draws.choices(range(len(content)), k=2))
        middle = draws.choice([b"", content[low:high] * 2, content[low:high][::-1], draws.randbytes(high - low)])
        texts.append(content[:low] + middle + content[high:])
    for text in (text for text in texts if text != content):
        (cache / "manifest.json").write_bytes(text)
        read_or_refuse(cache)
        with pytest.raises(CacheKDError, match=r"^[^\n]+$"):
            verify_cache(cache)
