"""A cache made by others, consistent in all its checksums, runs nothing, reads nothing outside and fills no memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import MIXED, NUM_IMAGES
from numcodecs import blosc

from cache_kd.cache import CacheReader, read_manifest, verify_cache
from cache_kd.cache.files import SEAL, open_seal, parse_json, seal, sha256
from cache_kd.cache.layout import ArrayLayout
from cache_kd.cache.manifest import columns_from_json, root_attributes
from cache_kd.cache.shard import decode_chunk, with_checksum
from cache_kd.errors import DamagedCacheError, MissingFileError
from cache_kd.fingerprint import canonical_json, digest_json
from cache_kd.structures import Column

ROW = Column("row", "u1", (2**20,))
MEMORY = 300 * 2**20


def forge(cache: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make everything that vouches for it agree, as an author of the cache can."""
    content = open_seal(json.loads((cache / "manifest.json").read_bytes()))
    change(content)
    content["identity_digest"] = digest_json(content["identity"])
    (cache / "manifest.json").write_bytes(seal(content))
    group = json.loads((cache / "zarr.json").read_bytes())
    columns = columns_from_json(content["columns"])
    group["attributes"]["cache_kd"] = root_attributes(content["identity"], columns, content["num_images"])
    (cache / "zarr.json").write_bytes(canonical_json(group))


def forge_list(cache: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the list of a view's files, and its hash in the manifest."""
    path = cache / "views" / MIXED.name / "shards.json"
    content = json.loads(path.read_bytes())
    change(content["files"])
    path.write_bytes(canonical_json(content))
    forge(cache, lambda manifest: manifest["shards"].update({MIXED.name: sha256(path.read_bytes())}))


def in_little_memory(code: str, *words: object) -> str:
    """Run Python code in a process that may take little more memory than it has after its imports; return its words."""
    limited = f"""
import resource, sys
import numpy as np
from pathlib import Path
from cache_kd.cache import CacheReader, verify_cache
from cache_kd.cache.layout import ArrayLayout
from cache_kd.cache.shard import decode_chunk
from cache_kd.errors import CacheKDError
from cache_kd.structures import Column, View
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {MEMORY}, used + {MEMORY}))
try:
    {code}
except CacheKDError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", limited, *map(str, words)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def zeros(size: int) -> bytes:
    return bytes(blosc.compress(np.zeros(size, np.uint8), b"zstd", 1, blosc.NOSHUFFLE, 0, 1))


def declaring(frame: bytes, *, inflated: int | None = None, block: int | None = None) -> bytes:
    """Return a blosc frame whose header tells something else."""
    found = list(struct.unpack_from("<III", frame, 4))
    found[0], found[1] = inflated or found[0], block or found[1]
    return frame[:4] + struct.pack("<III", *found) + frame[16:]


# -- chunks that inflate ----------------------------------------------------------------------------------------------

SIZE = ROW.row_bytes
BOMBS = {
    "more than the layout's": lambda: zeros(2**30),
    "2 GiB in its header": lambda: declaring(zeros(SIZE), inflated=2**31 - 17),
    "less in its header than inside": lambda: declaring(zeros(2**30), inflated=SIZE),
    "huge blocks": lambda: declaring(zeros(SIZE), block=2**31 - 1),
    "small header, huge blocks": lambda: declaring(zeros(2**30), inflated=SIZE, block=2**30),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_chunk_that_inflates_beyond_its_size_takes_no_memory(tmp_path: Path, bomb: str) -> None:
    (tmp_path / "chunk").write_bytes(with_checksum(BOMBS[bomb]()))
    layout = "ArrayLayout(Column('row', 'u1', (2**20,)), 7, 3)"
    said = in_little_memory(f"decode_chunk(Path(sys.argv[1]).read_bytes(), {layout})", tmp_path / "chunk")
    lied_to_us = bomb in ("more than the layout's", "2 GiB in its header")
    # blosc takes what fits the declared size out of the others, or refuses them.
    assert said.startswith("a chunk declares" if lied_to_us else ("a chunk does not decompress", "")), said


def test_an_honest_chunk_is_read_in_that_memory(tmp_path: Path) -> None:
    (tmp_path / "chunk").write_bytes(with_checksum(zeros(SIZE)))
    layout = "ArrayLayout(Column('row', 'u1', (2**20,)), 7, 3)"
    assert in_little_memory(f"print(decode_chunk(Path(sys.argv[1]).read_bytes(), {layout}).shape)", tmp_path / "chunk")
    assert decode_chunk((tmp_path / "chunk").read_bytes(), ArrayLayout(ROW, 7, 3)).shape == (1, SIZE)


# -- a manifest that declares too much --------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["reader.read_row(view, 'half', 0)", "verify_cache(path)", "reader.num_bytes"])
def test_more_samples_than_files_take_no_memory(cache: Path, read: str) -> None:
    forge(cache, lambda manifest: manifest.update(num_images=2**40))
    code = "path, view = Path(sys.argv[1]), View('mixed', 0); reader = CacheReader(path); report = " + read
    code += "; print(*getattr(report, 'faults', ()))"
    said = in_little_memory(code, cache)
    assert "shards.json" in said and "files are listed, those of the layout are" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["columns"][1].update(shape=[2**30, 2**30]), r"is over 1073741824 bytes"),
        (lambda m: m["columns"][1].update(shape=[2**31]), r"is over 1073741824 bytes"),
        (lambda m: m["head"]["taps"].append(["P9", 2**40, 8]), r"head has channels 4 to \d+; allowed: 1 to 65536"),
        (lambda m: m["head"].update(reg_max=10**9), "head has reg_max 1000000000 to 1000000000; allowed"),
        (lambda m: m["head"].update(taps=[["P3", 4, 0]]), "head has stride 0 to 0; allowed: 1 to"),
        (lambda m: m.update(num_images=2**41), "num_images is 2199023255552; allowed"),
        (lambda m: m.update(views=[f"mixed-{n:04d}" for n in range(10**5)]), "shards and views name different views"),
        (lambda m: m.update(seed="9" * 10**6), "seed is '999"),
    ],
)
def test_a_manifest_beyond_all_bounds_is_one_short_line(cache: Path, change: Any, says: str) -> None:
    forge_without_root(cache, change)
    with pytest.raises(DamagedCacheError, match=says) as caught:
        read_manifest(cache)
    assert len(str(caught.value)) < 2000


def forge_without_root(cache: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = open_seal(json.loads((cache / "manifest.json").read_bytes()))
    change(content)
    (cache / "manifest.json").write_bytes(seal(content))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "nested more than 64 levels deep"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair is no text"),
        (b'{"a": "\xed\xa0\x80"}', "invalid continuation byte"),
        (b'{"a": ' + b"9" * 10**5 + b"}", "Exceeds the limit"),
        (b'{"a": ' + b'"x" ' * 10**5 + b"}", "Expecting"),
    ],
    ids=["nesting", "inf", "Infinity", "surrogate", "raw surrogate", "digits", "long"],
)
def test_json_that_is_not_ours_is_one_short_line(text: bytes, says: str) -> None:
    with pytest.raises(DamagedCacheError, match=f"^manifest.json: not valid JSON .*{says}") as caught:
        parse_json(text, Path("manifest.json"))
    assert len(str(caught.value)) < 300


def test_names_with_backslashes_are_texts() -> None:
    assert parse_json(canonical_json({"a": "\\ud800", "b": "é🙂"}), Path("x")) == {"a": "\\ud800", "b": "é🙂"}


def test_a_manifest_of_more_than_16_mib_is_not_parsed(cache: Path) -> None:
    with (cache / "manifest.json").open("r+b") as file:
        file.truncate(16 * 2**20 + 1)
    with pytest.raises(DamagedCacheError, match="has 16777217 bytes, at most 16777216 are allowed"):
        read_manifest(cache)


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "file:///etc/passwd", "s3://bucket/x", "views/../../x", "a" * 10**5]
)
def test_a_path_out_of_the_cache_is_refused(cache: Path, path: str) -> None:
    forge_list(cache, lambda files: files[0].update(path=path))
    with pytest.raises(DamagedCacheError, match="the files listed are not those of the layout") as caught:
        CacheReader(cache).read_row(MIXED, "half", 0)
    assert len(str(caught.value)) < 1000
    assert not verify_cache(cache).ok


@pytest.mark.parametrize(
    "linked", ["manifest.json", "zarr.json", "data.json", "views/mixed-0000/shards.json", "teacher"]
)
def test_no_link_is_followed(cache: Path, tmp_path: Path, linked: str) -> None:
    (cache / linked).rename(tmp_path / "elsewhere")
    (cache / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCacheError, match="a symbolic link"):
        opened = CacheReader(cache)
        opened.read_data()
        opened.read_row(MIXED, "half", 0)
        opened.read_teacher("scale")


# -- Zarr's own metadata ----------------------------------------------------------------------------------------------


def test_arrays_of_zarr_2_are_not_read(cache: Path) -> None:
    folder = cache / "views" / MIXED.name / "half"
    (folder / "zarr.json").unlink()
    old = {"zarr_format": 2, "shape": [NUM_IMAGES], "chunks": [1], "dtype": "|O", "order": "C", "fill_value": None}
    (folder / ".zarray").write_text(json.dumps({**old, "filters": [{"id": "pickle"}], "compressor": None}))
    with pytest.raises(DamagedCacheError, match=r"half/zarr.json: the file is missing"):
        CacheReader(cache).read_row(MIXED, "half", 0)
    assert not verify_cache(cache).ok


def test_a_group_of_zarr_2_is_no_cache(cache: Path) -> None:
    (cache / "zarr.json").rename(cache / ".zgroup")
    with pytest.raises((MissingFileError, DamagedCacheError), match=r"is not a cache|zarr\.json: the file is missing"):
        CacheReader(cache)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"zarr_format": 2}, "zarr_format is 2, the manifest declares 3"),
        ({"data_type": "|O"}, r"data_type '\|O' is not allowed"),
        ({"data_type": {"name": "fixed_length_utf32"}}, "data_type .* is not allowed; allowed: uint8"),
        ({"codecs": [{"name": "numcodecs.pickle"}]}, r"codec numcodecs\.pickle is not allowed"),
        ({"codecs": ["pickle"]}, "codec pickle is not allowed"),
        ({"codecs": [{"name": "bytes"}] * 1000}, "codecs is .{200}, the manifest"),
        ({"shape": [2**31]}, r"shape is \[2147483648\], the manifest declares"),
    ],
)
def test_what_zarr_would_be_told_is_what_the_manifest_says(cache: Path, change: dict[str, Any], says: str) -> None:
    path = cache / "views" / MIXED.name / "half" / "zarr.json"
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(DamagedCacheError, match=f"half/zarr.json: {says}"):
        CacheReader(cache).read_row(MIXED, "half", 0)
    assert not verify_cache(cache).ok


def test_a_seal_is_part_of_no_content(cache: Path) -> None:
    assert SEAL not in open_seal(json.loads((cache / "manifest.json").read_bytes()))
