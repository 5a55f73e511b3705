"""Builders of heads and of cases that methods are tried on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from loss_cases import Case, make_head
from loss_cases import make_case as build_case

from cache_kd.structures import HeadSpec

pytest.register_assert_rewrite("function_suite", "labelled_suite")


@pytest.fixture
def head() -> Callable[..., HeadSpec]:
    """Return `make_head`."""
    return make_head


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Return `loss_cases.make_case`."""
    return build_case
