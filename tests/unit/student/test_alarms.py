"""A term that cannot be teaching anything is warned of or ends the run."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from cache_kd.errors import AlarmError
from cache_kd.student.alarms import CONSTANT_STEPS, TermWatch, gradient_shares

LOGGER = "cache_kd.student.alarms"


def test_a_term_constant_for_fifty_steps_is_an_error() -> None:
    watch = TermWatch()
    for _ in range(CONSTANT_STEPS - 1):
        watch.see({"cwd": 2.5})
    with pytest.raises(AlarmError, match=r"term cwd has been 2\.5 for 50 steps.*cache-kd verify"):
        watch.see({"cwd": 2.5})


def test_one_other_value_starts_the_count_again() -> None:
    watch = TermWatch()
    for step in range(4 * CONSTANT_STEPS):
        watch.see({"cwd": float(step % (CONSTANT_STEPS - 1) == 0), "ld": float(step)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(AlarmError, match=r"term ld is -?(nan|inf) although the student's outputs are finite"):
        TermWatch().see({"cwd": 1.0, "ld": value})


def test_a_student_that_is_not_finite_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = TermWatch()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        for _ in range(3):
            watch.see({"ld": math.nan}, student_finite=False)
    assert [record.getMessage() for record in caplog.records] == [
        "ld: the student's outputs are not finite in this step"
    ]


def test_a_term_of_zero_is_warned_of_once_a_term(caplog: pytest.LogCaptureFixture) -> None:
    watch = TermWatch()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        for _ in range(3):
            watch.see({"cwd": 0.0, "ld": 1e-30})
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["cwd"]


@pytest.mark.parametrize(("share", "warned"), [(0.0, True), (0.009, True), (0.01, False), (0.9, False), (0.91, True)])
def test_shares_outside_one_to_ninety_percent_are_warned_of(
    share: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        TermWatch().see_shares({"cwd": share})
    assert bool(caplog.records) is warned


def test_a_share_is_the_terms_part_of_the_gradient_on_all_levels() -> None:
    levels = [torch.ones(2, 3, requires_grad=True), torch.ones(4, requires_grad=True)]
    detection = 3 * levels[0][0, 0] + 4 * levels[1][0]
    terms = {
        "five": 5 * levels[0][1, 1],
        "fifteen": 9 * levels[0][0, 2] + 12 * levels[1][3],
        "none": torch.tensor(1.0),
        "zero": levels[0].sum() * 0,
    }
    found = gradient_shares(detection, terms, levels)
    assert found == pytest.approx({"five": 0.5, "fifteen": 0.75, "none": 0.0, "zero": 0.0})


def test_measuring_shares_leaves_the_gradient_for_the_step() -> None:
    level = torch.ones(3, requires_grad=True)
    loss = (level**2).sum()
    gradient_shares(loss, {"term": level.sum()}, [level])
    assert level.grad is None
    loss.backward()
    assert level.grad is not None and level.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_frozen_neck_has_no_shares() -> None:
    frozen, trained = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (frozen * 2).sum() + trained.sum()
    assert gradient_shares(loss, {"term": trained.sum()}, [frozen]) == {}
    assert gradient_shares(loss, {"term": trained.sum()}, [frozen, trained]) == pytest.approx({"term": 0.5})
