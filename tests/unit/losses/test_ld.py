"""LD: the function by hand and against its formula, the module against which anchors count and by what weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import RowSuite, draw
from reference_math import RTOL, chosen_anchors, divergence, logits, numbers, softmax, tensors

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses.labels import boxes_by_image
from cache_kd.losses.ld import LD, ld_loss
from cache_kd.losses.spec import parse_loss
from cache_kd.losses.vlr import vlr_weights
from cache_kd.structures import HeadSpec


class TestLd(RowSuite):
    call = staticmethod(ld_loss)
    student, teacher = draw(5, 4, 4), draw(5, 4, 4, seed=1)


def ld_row(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    bins = student.shape[-1]
    return sum(
        divergence(softmax(teacher[side] / temperature), softmax(student[side] / temperature)) / bins * temperature**2
        for side in range(4)
    )


def test_by_hand() -> None:
    # Two bins, one side differs; T = 1: the sum over sides of the mean over bins.
    teacher, student = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    teacher[0, 2, 0] = math.log(3)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert ld_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)
    assert ld_loss(student, 10 * teacher).item() == pytest.approx(100 * expected, rel=1e-5)


def test_does_not_see_a_constant_a_side() -> None:
    student, teacher = TestLd.student, TestLd.teacher
    shifted = teacher - teacher.amax(-1, keepdim=True)
    assert ld_loss(student, shifted).item() == pytest.approx(ld_loss(student, teacher).item(), rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_keeps_the_scale_of_small_gradients(temperature: float) -> None:
    """T² is there so that near the teacher the gradient hardly depends on T."""
    teacher = draw(1, 4, 6) * 1e-3

    def slope(temperature: float) -> float:
        student = torch.zeros_like(teacher).requires_grad_()
        loss = ld_loss(student, teacher, temperature=temperature)
        return float(torch.autograd.grad(loss, student)[0].norm())

    assert slope(temperature) == pytest.approx(slope(1.0), 1e-2)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_equals_the_formula(temperature: float) -> None:
    student, teacher, weight = numbers(5, 4, 8, seed=0), numbers(5, 4, 8, seed=1), np.abs(numbers(5, seed=2))
    expected = sum(w * ld_row(s, t, temperature) for s, t, w in zip(student, teacher, weight, strict=True)) / 7
    found = ld_loss(
        *tensors(student, teacher), temperature=temperature, weight=torch.from_numpy(weight), normalizer=7.0
    )
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_default_temperature_is_the_papers() -> None:
    student, teacher = numbers(2, 4, 8, seed=0), numbers(2, 4, 8, seed=1)
    found = ld_loss(*tensors(student, teacher)).item()
    assert found == pytest.approx(sum(map(ld_row, student, teacher, (10.0, 10.0))), rel=RTOL)


def test_module(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64, reg_max=8)
    pairs, sure, total = chosen_anchors(case)
    _, _, ours, theirs = logits(case)
    rows = (sure[i] * ld_row(ours[i].reshape(4, 8), theirs[i].reshape(4, 8), 10.0) for i in pairs)
    found = LD(case.teacher, case.student)(case.output, case.targets)
    assert found.item() == pytest.approx(sum(rows) / total, rel=RTOL)


@pytest.mark.parametrize("reg_max", [(16, 8), (1, 16), (16, 1)])
def test_unequal_bins_are_refused(reg_max: tuple[int, int], head: Callable[..., HeadSpec]) -> None:
    with pytest.raises(MismatchError, match=r"loss ld.*allowed: equal and at least 2"):
        LD(head(8, reg_max=reg_max[0]), head(8, reg_max=reg_max[1]))


def weighted_rows(case: Any, weights: np.ndarray) -> float:
    """Σ weight · row over the sent anchors of a batch with 8 bins."""
    _, _, ours, theirs = logits(case)
    sent = case.targets.sent.numpy()
    chosen = [i for i in np.ndindex(*weights.shape) if sent[i] and weights[i] > 0]
    return sum(weights[i] * ld_row(ours[i].reshape(4, 8), theirs[i].reshape(4, 8), 10.0) for i in chosen)


def valuable(case: Any) -> np.ndarray:
    """IoU of the anchors in LD's valuable region, as the tests of `vlr_weights` establish it."""
    boxes = boxes_by_image(case.targets.labels, len(case.output.scores))
    grids = [tuple(level.shape[2:]) for level in case.output.features]
    return vlr_weights(boxes, grids=grids, strides=[tap.stride for tap in case.teacher.taps]).double().numpy()


def test_assigned_region(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64, reg_max=8)
    quality = case.output.assigned.quality.numpy()
    loss = LD(case.teacher, case.student, region="assigned")
    found = loss(case.output, replace(case.targets, scores=None))
    assert quality.sum() > 1
    assert found.item() == pytest.approx(weighted_rows(case, quality) / quality.sum(), rel=RTOL)
    faint = replace(case.output, assigned=replace(case.output.assigned, quality=torch.from_numpy(quality / 1e3)))
    assert loss(faint, case.targets).item() == pytest.approx(weighted_rows(case, quality / 1e3), rel=RTOL)


@pytest.mark.parametrize("vlr", [0.25, 2.0])
@pytest.mark.parametrize("region", ["teacher", "assigned"])
def test_valuable_region_is_added_over_the_same_divisor(region: str, vlr: float, make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64, reg_max=8)
    weights = valuable(case)
    assert 0 < ((weights > 0) & case.targets.sent.numpy()).sum() < (weights > 0).sum()
    main = LD(case.teacher, case.student, region=region)(case.output, case.targets)
    total = chosen_anchors(case)[2] if region == "teacher" else case.output.assigned.quality.sum().item()
    found = LD(case.teacher, case.student, region=region, vlr=vlr)(case.output, case.targets)
    assert found.item() == pytest.approx(main.item() + vlr * weighted_rows(case, weights) / total, rel=RTOL)
    assert found > main + 0.01


@pytest.mark.parametrize("region", ["teacher", "assigned"])
def test_every_region_is_a_mean_over_images(region: str, make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64)
    loss = LD(case.teacher, case.student, region=region, vlr=0.25)
    once = loss(case.output, case.targets)
    assigned, labels = case.output.assigned, case.targets.labels
    output = replace(
        case.output,
        boxes=case.output.boxes.repeat(2, 1, 1),
        assigned=replace(assigned, positive=assigned.positive.repeat(2, 1), quality=assigned.quality.repeat(2, 1)),
    )
    targets = replace(
        case.targets,
        scores=case.targets.scores.repeat(2, 1, 1),
        boxes=case.targets.boxes.repeat(2, 1, 1),
        sent=case.targets.sent.repeat(2, 1),
        labels=replace(
            labels, image=torch.cat((labels.image, labels.image + 2)), boxes=torch.cat((labels.boxes, labels.boxes))
        ),
    )
    assert loss(output, targets).item() == pytest.approx(once.item(), rel=1e-9)


def test_without_labelled_objects_the_valuable_region_is_empty(make_case: Callable[..., Any]) -> None:
    case = make_case()
    labels = case.targets.labels
    none = replace(labels, image=labels.image[:0], cls=labels.cls[:0], boxes=labels.boxes[:0])
    expected = LD(case.teacher, case.student)(case.output, case.targets)
    found = LD(case.teacher, case.student, vlr=1.0)(case.output, replace(case.targets, labels=none))
    assert found.item() == expected.item()


@pytest.mark.parametrize(
    ("text", "needs", "reads"),
    [
        ("ld", set(), set()),
        ("ld:vlr=0.25", {"vlr"}, {"labels"}),
        ("ld:vlr=0,region=teacher", set(), set()),
        ("ld:region=assigned", set(), {"assignment"}),
        ("ld:region=assigned,vlr=0.25", {"vlr"}, {"labels", "assignment"}),
    ],
)
def test_it_asks_for_what_its_regions_need(text: str, needs: set[str], reads: set[str]) -> None:
    spec = parse_loss(text)
    assert spec.needs == {"logits"} | needs
    assert spec.reads == reads


def test_what_a_region_lacks_is_asked_for(make_case: Callable[..., Any]) -> None:
    case = make_case()
    bare = replace(case.output, assigned=None)
    with pytest.raises(MismatchError, match="loss ld needs the student's assignment"):
        LD(case.teacher, case.student, region="assigned")(bare, case.targets)
    with pytest.raises(MismatchError, match="loss ld needs labels"):
        LD(case.teacher, case.student, vlr=0.25)(case.output, replace(case.targets, labels=None))
    plain = LD(case.teacher, case.student)
    assert plain(bare, replace(case.targets, labels=None)).item() == plain(case.output, case.targets).item()


@pytest.mark.parametrize(
    ("option", "value", "rule"), [("region", "labels", "teacher, assigned"), ("vlr", -0.1, "finite numbers from 0")]
)
def test_options_out_of_range_are_refused(option: str, value: Any, rule: str, make_case: Callable[..., Any]) -> None:
    case = make_case()
    with pytest.raises(SettingError, match=f"loss ld: {option}={value} is not allowed; allowed: {rule}$"):
        LD(case.teacher, case.student, **{option: value})
