"""Each function against hand-computed cases, finite differences and its rules for weights, empty input and types."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses.bckd import bckd_box_loss, bckd_cls_loss
from cache_kd.losses.boxes import decode_boxes
from cache_kd.losses.cwd import cwd_loss
from cache_kd.losses.kd import kd_loss
from cache_kd.losses.ld import ld_loss
from cache_kd.losses.mimic import mimic_loss
from cache_kd.losses.sl2 import sl2_loss

Loss = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_boxes(n: int, seed: int) -> Tensor:
    low = draw(n, 2, seed=seed)
    return torch.cat((low, low + 1.5 + draw(n, 2, seed=seed + 50).abs()), 1)


def kd_sigmoid(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return kd_loss(student, teacher, temperature=2.0, **options)


def kd_softmax(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return kd_loss(student, teacher, temperature=2.0, protocol="softmax", **options)


def sl2_even(student: Tensor, teacher: Tensor) -> Tensor:
    return sl2_loss(student, teacher, torch.full((student.shape[0], 1, student[0, 0].numel()), 0.3))


# name: function, student, teacher
MAPS: dict[str, tuple[Loss, Tensor, Tensor]] = {
    "cwd": (cwd_loss, draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)),
    "mimic": (mimic_loss, draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)),
    "sl2": (sl2_even, draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)),
}
ROWS: dict[str, tuple[Loss, Tensor, Tensor]] = {
    "kd sigmoid": (kd_sigmoid, draw(5, 3), draw(5, 3, seed=1)),
    "kd softmax": (kd_softmax, draw(5, 3), draw(5, 3, seed=1)),
    "bckd cls": (bckd_cls_loss, draw(5, 3), draw(5, 3, seed=1)),
    "bckd box": (bckd_box_loss, draw_boxes(5, 0), draw_boxes(5, 1)),
    "ld": (ld_loss, draw(5, 4, 4), draw(5, 4, 4, seed=1)),
}
ALL = {**MAPS, **ROWS}


@pytest.mark.parametrize("case", ALL)
def test_zero_at_identity_and_positive_elsewhere(case: str) -> None:
    function, student, teacher = ALL[case]
    assert function(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert function(student, teacher) > 1e-3


@pytest.mark.parametrize("case", ALL)
def test_gradient_equals_finite_differences(case: str) -> None:
    function, student, teacher = ALL[case]
    assert torch.autograd.gradcheck(
        lambda s: function(s, teacher), student.clone().requires_grad_(), atol=1e-8, rtol=1e-6
    )


@pytest.mark.parametrize("case", ALL)
def test_teacher_gets_no_gradient(case: str) -> None:
    function, student, teacher = ALL[case]
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    function(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("case", ALL)
def test_types(case: str) -> None:
    function, student, teacher = ALL[case]
    assert function(student, teacher.float()).dtype == torch.float64
    assert function(student.float(), teacher).dtype == torch.float32
    half = function(student.half(), teacher.half())
    assert half.dtype == torch.float32
    assert half.item() == function(student.half().float(), teacher.half().float()).item()


@pytest.mark.parametrize("case", ALL)
def test_extreme_values_stay_finite(case: str) -> None:
    function, student, teacher = ALL[case]
    student = (student.float().sign() * 1e4).requires_grad_()
    loss = function(student, teacher.float().sign() * 1e4)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("case", ALL)
def test_unequal_shapes_are_refused(case: str) -> None:
    function, student, teacher = ALL[case]
    with pytest.raises(MismatchError, match="must be of one shape"):
        function(student, teacher[:1])


@pytest.mark.parametrize("case", ROWS)
def test_weight_is_one_a_row_and_normalizer_divides(case: str) -> None:
    function, student, teacher = ROWS[case]
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0])
    rows = [function(student[i : i + 1], teacher[i : i + 1]).item() for i in range(5)]
    expected = sum(w * row for w, row in zip(weight.tolist(), rows, strict=True)) / 4
    assert function(student, teacher, weight=weight, normalizer=4.0).item() == pytest.approx(expected, rel=1e-9)
    assert function(student, teacher, weight=weight, normalizer=torch.tensor(4.0)).item() == pytest.approx(expected)
    with pytest.raises(MismatchError, match=r"weight is of shape \(5, 1\); allowed: one value a row, \(5,\)"):
        function(student, teacher, weight=weight[:, None])


@pytest.mark.parametrize("case", ROWS)
def test_without_normalizer_kd_is_a_mean_and_the_others_a_sum(case: str) -> None:
    function, student, teacher = ROWS[case]
    divisor = 5 if case.startswith("kd") else 1
    total = function(student, teacher, normalizer=1.0).item()
    assert function(student, teacher).item() == pytest.approx(total / divisor, rel=1e-12)


@pytest.mark.parametrize("case", ROWS)
def test_weight_gets_no_gradient(case: str) -> None:
    function, student, teacher = ROWS[case]
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    function(student.clone().requires_grad_(), teacher, weight=weight).backward()
    assert weight.grad is None


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("normalizer", [None, 3.0])
def test_no_rows_give_a_differentiable_zero(case: str, normalizer: float | None) -> None:
    function, student, teacher = ROWS[case]
    student = student[:0].clone().requires_grad_()
    loss = function(student, teacher[:0], weight=torch.ones(0), normalizer=normalizer)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and student.grad.shape == student.shape


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_keeps_the_scale_of_small_gradients(temperature: float) -> None:
    """T² is there so that near the teacher the gradient hardly depends on T."""
    teacher = draw(4, 6) * 1e-3

    def slope(function: Loss) -> float:
        student = torch.zeros_like(teacher).requires_grad_()
        return float(torch.autograd.grad(function(student, teacher), student)[0].norm())

    plain = slope(lambda s, t: kd_loss(s, t, temperature=1.0, protocol="softmax"))
    assert slope(lambda s, t: kd_loss(s, t, temperature=temperature, protocol="softmax")) == pytest.approx(plain, 1e-2)
    plain = slope(lambda s, t: ld_loss(s[None, :], t[None, :], temperature=1.0))
    assert slope(lambda s, t: ld_loss(s[None, :], t[None, :], temperature=temperature)) == pytest.approx(plain, 1e-2)
    plain = slope(lambda s, t: cwd_loss(s[None, :, None], t[None, :, None]))
    assert slope(lambda s, t: cwd_loss(s[None, :, None], t[None, :, None], temperature=temperature)) == pytest.approx(
        plain, 1e-2
    )


def test_cwd_by_hand() -> None:
    # Two positions: the teacher's softmax is (3/4, 1/4), the student's (1/2, 1/2).
    teacher, student = torch.tensor([[[[math.log(3), 0.0]]]]), torch.zeros(1, 1, 1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert cwd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    # Temperature 2 on twice the logits: the same distributions, times T².
    assert cwd_loss(student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * expected, rel=1e-6)
    # A mean over images and channels.
    wide = teacher.expand(3, 5, 1, 2)
    assert cwd_loss(torch.zeros_like(wide), wide).item() == pytest.approx(expected, rel=1e-6)


def test_cwd_does_not_see_a_constant_a_channel() -> None:
    function, student, teacher = MAPS["cwd"]
    shift = draw(2, 3, 1, 1, seed=9)
    assert function(student + shift, teacher).item() == pytest.approx(function(student, teacher).item(), rel=1e-12)


def test_mimic_by_hand() -> None:
    student, teacher = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]])
    assert mimic_loss(student, teacher).item() == pytest.approx((1 + 4 + 9 + 16) / 4)


def test_sl2_by_hand() -> None:
    # Cells weigh 1 and 0.5, two channels: (1·(1 + 4) + 0.5·(9 + 16)) / (2 · 1.5).
    teacher = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]])
    loss = sl2_loss(torch.zeros_like(teacher), teacher, torch.tensor([[[1.0, 0.5]]]))
    assert loss.item() == pytest.approx((5 + 12.5) / 3, rel=1e-6)
    assert sl2_loss(torch.zeros_like(teacher), teacher, torch.zeros(1, 1, 2)).item() == 0


def test_sl2_wants_one_score_a_cell() -> None:
    with pytest.raises(
        MismatchError, match=r"teacher_score is of shape \(1, 2\); allowed: one value a cell, \(1, 1, 2\)"
    ):
        sl2_loss(torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 1, 2), torch.ones(1, 2))


def test_kd_by_hand() -> None:
    # σ(log 3) = 3/4 against σ(0) = 1/2, one class; softmax of (log 3, 0) is the same pair of numbers.
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    one = kd_loss(torch.zeros(1, 1), torch.tensor([[math.log(3)]]), temperature=1.0)
    assert one.item() == pytest.approx(expected, rel=1e-6)
    two = kd_loss(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), temperature=1.0, protocol="softmax")
    assert two.item() == pytest.approx(expected, rel=1e-6)
    hot = kd_loss(torch.zeros(1, 1), torch.tensor([[2 * math.log(3)]]), temperature=2.0)
    assert hot.item() == pytest.approx(4 * expected, rel=1e-6)


def test_kd_gradient_is_temperature_times_the_gap() -> None:
    _, student, teacher = ROWS["kd sigmoid"]
    student = student.clone().requires_grad_()
    kd_loss(student, teacher, temperature=3.0, normalizer=1.0).backward()
    expected = 3 * ((student.detach() / 3).sigmoid() - (teacher / 3).sigmoid())
    torch.testing.assert_close(student.grad, expected, rtol=1e-9, atol=1e-12)


def test_softmax_does_not_see_a_common_shift_and_sigmoid_does() -> None:
    _, student, _ = ROWS["kd softmax"]
    assert kd_softmax(student + 3, student).item() == pytest.approx(0, abs=1e-12)
    assert kd_sigmoid(student + 3, student) > 0.1


def test_kd_refuses_an_unknown_protocol() -> None:
    with pytest.raises(SettingError, match=r"no protocol 'softmx'; known: sigmoid, softmax; did you mean 'softmax'\?"):
        kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=1.0, protocol="softmx")


def test_bckd_cls_by_hand() -> None:
    # p_t = 3/4, p_s = 1/2: |gap| = 1/4, BCE against logit 0 = log 2.
    student, teacher = torch.zeros(2, 1), torch.full((2, 1), math.log(3))
    assert bckd_cls_loss(student, teacher).item() == pytest.approx(2 * math.log(2) / 4, rel=1e-6)
    assert bckd_cls_loss(student, teacher, beta=2.0).item() == pytest.approx(2 * math.log(2) / 16, rel=1e-6)


def test_bckd_cls_gap_is_not_detached() -> None:
    # d/ds [(p_t − p_s)·BCE] at s = 0 = −p_s(1 − p_s)·log 2 + (p_t − p_s)·(p_s − p_t), gap positive.
    student = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    bckd_cls_loss(student, torch.full((1, 1), math.log(3), dtype=torch.float64)).backward()
    assert student.grad is not None
    assert student.grad.item() == pytest.approx(-0.25 * math.log(2) - 0.25 * 0.25, rel=1e-9)


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ([0.0, 0.0, 2.0, 2.0], 0.0),
        ([0.0, 0.0, 1.0, 2.0], 0.5),  # half the area, hull = union
        ([1.0, 1.0, 3.0, 3.0], 1 - (1 / 7 - 2 / 9)),
        ([4.0, 0.0, 6.0, 2.0], 1 - (0 - 4 / 12)),  # apart: only the hull counts
    ],
)
def test_bckd_box_by_hand(student: list[float], expected: float) -> None:
    loss = bckd_box_loss(torch.tensor([student]), torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_bckd_box_is_finite_for_inverted_and_empty_boxes() -> None:
    student = torch.tensor([[2.0, 2.0, 1.0, 1.0], [0.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    loss = bckd_box_loss(student, torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(3, 4))
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_ld_by_hand() -> None:
    # Two bins, one side differs; T = 1: the sum over sides of the mean over bins.
    teacher, student = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    teacher[0, 2, 0] = math.log(3)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert ld_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)
    assert ld_loss(student, 10 * teacher).item() == pytest.approx(100 * expected, rel=1e-5)


def test_ld_does_not_see_a_constant_a_side() -> None:
    _, student, teacher = ROWS["ld"]
    shifted = teacher - teacher.amax(-1, keepdim=True)
    assert ld_loss(student, shifted).item() == pytest.approx(ld_loss(student, teacher).item(), rel=1e-10)


def test_boxes_are_decoded_from_bins_and_from_distances() -> None:
    distances = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    assert decode_boxes(distances, 1).tolist() == [[-1.0, -2.0, 3.0, 0.5]]
    # All mass on bins 1, 2, 3; the last side half on bin 0 and half on bin 1.
    logits = torch.full((1, 4, 4), -100.0)
    for side, bins in enumerate(((1,), (2,), (3,), (0, 1))):
        logits[0, side, list(bins)] = 0.0
    torch.testing.assert_close(decode_boxes(logits.flatten(1), 4), torch.tensor([[-1.0, -2.0, 3.0, 0.5]]))
