"""In: the settings of `few_cache`. Out: extractions into it, refused or not, and its teacher and data changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_kd.errors import MismatchError
from cache_kd.pipeline.extraction import ExtractSettings
from cache_kd.pipeline.preparation import prepare


def settings(teacher: Path, data: Path, cache: Path | None, **changes: Any) -> ExtractSettings:
    """Return what `few_cache` was extracted with, changed."""
    same: dict[str, Any] = {"views": 2, "plain_views": 1, "imgsz": 64, "batch": 4, "device": "cpu", "workers": 0}
    return ExtractSettings(teacher, data, cache, **{**same, **changes})


def content(cache: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(cache.rglob("*")) if file.is_file()}


def refusal(chosen: ExtractSettings) -> str:
    """Return the line by which an extraction into a cache is refused, after checking that the cache is untouched."""
    assert chosen.cache is not None
    before = content(chosen.cache)
    with pytest.raises(MismatchError, match="is a cache of something else") as caught:
        prepare(chosen, print)
    assert content(chosen.cache) == before
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1500
    return line


def named(line: str) -> list[str]:
    """Return the differences that a refusal lists."""
    found = re.search(r"something else \((.*)\); give another --cache", line)
    assert found, line
    return found[1].split("; ")


def flip_bit(tensor: torch.Tensor) -> None:
    """Change the last bit of one value in place."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor.data.view(-1).view(kind)[0] ^= 1


def saved_with(teacher: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a teacher's checkpoint again, changed."""
    stored = torch.load(teacher, map_location="cpu", weights_only=False)
    change(stored)
    torch.save(stored, path)
    return path


def files(data: Path, kind: str) -> list[Path]:
    return sorted((data.parent / kind / "train").iterdir())


def change_byte(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


def swap(one: Path, other: Path) -> None:
    one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_bytes)
    other.write_bytes(one_bytes)


def rename(data: Path, index: int, stem: str) -> None:
    """Rename an image and its label."""
    for kind in ("images", "labels"):
        path = files(data, kind)[index]
        path.rename(path.with_name(stem + path.suffix))
