"""The losses of a training that names none: what the cache stores and the head says decide."""

from __future__ import annotations

import pytest

from cache_kd.losses import parse_losses
from cache_kd.pipeline.default_losses import default_losses
from cache_kd.structures import HeadSpec, Tap


@pytest.mark.parametrize("reg_max", [1, 16])
@pytest.mark.parametrize("stored", [("features", "logits"), ("features",), ("logits",)])
def test_a_cache_has_all_that_its_default_losses_need(stored: tuple[str, ...], reg_max: int) -> None:
    head = HeadSpec((Tap("P3", 8, 8),), reg_max, ("cell",))
    found = default_losses(stored, head)
    expected = {"features": ("cwd",), "logits": ("ld",) if reg_max > 1 else ("bckd",)}
    assert found == expected[stored[0]]
    assert {need for spec in parse_losses(list(found)) for need in spec.needs} <= set(stored)
