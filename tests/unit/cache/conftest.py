"""Out: shards of three samples, so that seven images make three shards, the last one partly filled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cache_cases import MIXED, write_views

from cache_kd.cache import layout


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_SAMPLES", 3)
    # Nothing here outlives a power cut; the order of syncs has a test of its own.
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A complete cache of one view."""
    path = tmp_path / "cache"
    write_views(path, MIXED)
    return path
