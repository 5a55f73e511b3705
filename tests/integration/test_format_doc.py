"""docs/format.md is right: its example reads a real cache with zarr-python alone, and it names all that there is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_kd.cache.manifest import read_manifest
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.packed import ARRAYS
from cache_kd.structures import View

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
VIEW = View("mixed", 0)


@pytest.fixture
def read(few_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the example leaves, run beside a copy of a cache at the place that it names."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    (place,) = re.findall(r'^cache = "(.*)"$', example, re.M)
    shutil.copytree(few_cache, tmp_path / place)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/format.md", "exec"), names)
    return names


def test_the_example_reads_what_is_there(read: dict[str, Any], few_cache: Path) -> None:
    assert "cache_kd" not in {name.split(".")[0] for name in re.findall(r"^import (\S+)", TEXT, re.M)}
    cache = Cache(few_cache)
    row = cache.reader.read(VIEW, 5, ("features", "logits", "pixel_hash"))
    assert np.array_equal(read["codes"], row["features"]) and np.array_equal(read["logits"], row["logits"])
    assert read["proof"] == row["pixel_hash"].tobytes()
    said = cache.codec.decode_one(row | cache.reader.read(VIEW, 5, [c.name for c in cache.codec.columns]))
    assert said.sent is not None and said.scores is not None
    assert read["anchors"].tolist() == torch.nonzero(said.sent[0]).flatten().tolist()
    unsent = said.scores[0][~said.sent[0]][0]
    assert np.array_equal(read["tail"].astype(np.float32), unsent.numpy())
    assert read["images"] == [image.path for image in cache.images]
    assert np.array_equal(read["weight"], cache.reader.read_teacher("cv2.0.0.conv.weight"))


def test_every_key_and_file_is_named(few_cache: Path) -> None:
    manifest = read_manifest(few_cache)
    table = TEXT[TEXT.index("## The manifest") : TEXT.index("## Compression")]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line[:3] == "| `")))
    assert named == {*manifest.to_json(), "checksum"}
    assert all(f"`{name}`" in TEXT for name in ARRAYS)
    files = {path.name for path in few_cache.rglob("*") if path.is_file() and not re.fullmatch(r"\d+", path.name)}
    units = {path.name for path in (few_cache / "units").iterdir()}
    assert "mixed-0000-00000.json" in units
    assert {name for name in files - units if name not in TEXT} == set()
