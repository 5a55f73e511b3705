"""What every loss function promises: subclass `FunctionSuite`, or `RowSuite` for a loss of rows, in a method's file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_kd.errors import MismatchError

Loss = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_boxes(n: int, seed: int) -> Tensor:
    low = draw(n, 2, seed=seed)
    return torch.cat((low, low + 1.5 + draw(n, 2, seed=seed + 50).abs()), 1)


class FunctionSuite:
    """A loss of a student's and a teacher's tensor of one shape.

    Attributes:
        call: the function, as a static method: (student, teacher, *extras) to a scalar.
        student, teacher: sample tensors in float64, unlike each other.
        extras: further arguments, such as target classes.
        at_identity: "zero"; "stationary", the smallest value is at student = teacher, above 0; or "other".
        least: what the sample's loss must exceed.
    """

    call: Loss
    student: Tensor
    teacher: Tensor
    extras: tuple[Any, ...] = ()
    at_identity: str = "zero"
    least: float = 1e-3

    def loss(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return self.call(student, teacher, *self.extras, **options)

    def test_value_at_identity(self) -> None:
        student = self.teacher.clone().requires_grad_()
        same = self.loss(student, self.teacher)
        other = self.loss(self.student, self.teacher)
        assert other > self.least and same.isfinite()
        if self.at_identity == "other":
            return
        (slope,) = torch.autograd.grad(same, student)
        assert other > same + self.least
        if self.at_identity == "zero":
            assert same.item() == pytest.approx(0, abs=1e-12)
        else:
            assert self.at_identity == "stationary"
            assert same > self.least
            assert slope.abs().max() < 1e-9

    def test_gradient_equals_finite_differences(self) -> None:
        student = self.student.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s: self.loss(s, self.teacher), student, atol=1e-8, rtol=1e-6)

    def test_teacher_gets_no_gradient(self) -> None:
        student, teacher = self.student.clone().requires_grad_(), self.teacher.clone().requires_grad_()
        self.loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad is not None and student.grad.abs().sum() > 0

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
    def test_types(self, half: torch.dtype) -> None:
        student, teacher = self.student, self.teacher
        assert self.loss(student, teacher.float()).dtype == torch.float64
        assert self.loss(student.float(), teacher).dtype == torch.float32
        found = self.loss(student.to(half), teacher.to(half))
        assert found.dtype == torch.float32
        assert found.item() == self.loss(student.to(half).float(), teacher.to(half).float()).item()

    @pytest.mark.parametrize("size", [1e4, 6e4])
    def test_extreme_values_stay_finite(self, size: float) -> None:
        student = (self.student.float().sign() * size).requires_grad_()
        loss = self.loss(student, self.teacher.float().sign() * size)
        loss.backward()
        assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()

    def test_unequal_shapes_are_refused(self) -> None:
        with pytest.raises(MismatchError, match="must be of one shape"):
            self.loss(self.student, self.teacher[:1])


class RowSuite(FunctionSuite):
    """A loss of rows, five in the sample, with `weight` and `normalizer`; `extras` have a row each too.

    Attributes:
        without_normalizer: "mean" over rows, or their "sum".
    """

    extras: tuple[Tensor, ...] = ()
    without_normalizer: str = "sum"

    def rows(self, rows: slice, **options: Any) -> Tensor:
        return self.call(self.student[rows], self.teacher[rows], *(extra[rows] for extra in self.extras), **options)

    def test_weight_is_one_a_row_and_normalizer_divides(self) -> None:
        weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0])
        rows = [self.rows(slice(i, i + 1)).item() for i in range(5)]
        expected = sum(w * row for w, row in zip(weight.tolist(), rows, strict=True)) / 4
        everything = slice(None)
        assert self.rows(everything, weight=weight, normalizer=4.0).item() == pytest.approx(expected, rel=1e-9)
        found = self.rows(everything, weight=weight, normalizer=torch.tensor(4.0))
        assert found.item() == pytest.approx(expected, rel=1e-9)
        with pytest.raises(MismatchError, match=r"weight is of shape \(5, 1\); allowed: one value a row, \(5,\)"):
            self.rows(everything, weight=weight[:, None])

    def test_without_normalizer(self) -> None:
        assert self.without_normalizer in ("mean", "sum")
        divisor = 5 if self.without_normalizer == "mean" else 1
        total = self.loss(self.student, self.teacher, normalizer=1.0).item()
        assert self.loss(self.student, self.teacher).item() == pytest.approx(total / divisor, rel=1e-12)

    def test_weight_gets_no_gradient(self) -> None:
        weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
        self.loss(self.student.clone().requires_grad_(), self.teacher, weight=weight).backward()
        assert weight.grad is None

    @pytest.mark.parametrize("normalizer", [None, 3.0])
    def test_no_rows_give_a_differentiable_zero(self, normalizer: float | None) -> None:
        student = self.student[:0].clone().requires_grad_()
        extras = (extra[:0] for extra in self.extras)
        loss = self.call(student, self.teacher[:0], *extras, weight=torch.ones(0), normalizer=normalizer)
        loss.backward()
        assert loss.item() == 0
        assert student.grad is not None and student.grad.shape == student.shape
