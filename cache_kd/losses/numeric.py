"""In: student and teacher tensors of any float type. Out: a pair safe to compare, and rows reduced to a scalar."""

from __future__ import annotations

import torch
from torch import Tensor

from cache_kd.errors import MismatchError

HALF_TYPES = (torch.float16, torch.bfloat16)


def at_least_float32(values: Tensor) -> Tensor:
    """Return `values` in float32 if they are of a half type, else unchanged (float64 stays float64)."""
    return values.float() if values.dtype in HALF_TYPES else values


def comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors in the student's working type, the teacher's without gradient.

    Raises:
        MismatchError: the shapes differ; broadcasting would hide a wrong pairing.
    """
    if student.shape != teacher.shape:
        raise MismatchError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be of one shape")
    student = at_least_float32(student)
    return student, teacher.detach().to(student.dtype)


def comparable_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `comparable` does for (N, F, H, W) maps whose channel numbers may differ.

    Raises:
        MismatchError: the shapes differ in more than channels.
    """
    if student.dim() != 4 or student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise MismatchError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be of one shape, channels excepted"
        )
    student = at_least_float32(student)
    return student, teacher.detach().to(student.dtype)


def cell_mask(mask: Tensor, maps: Tensor) -> Tensor:
    """Return the mask (N, 1, H, W) of cells, bool or 0/1, in the type of `maps` (N, F, H, W) and without gradient.

    Raises:
        MismatchError: the mask is of another shape.
    """
    cells = (maps.shape[0], 1, *maps.shape[2:])
    if mask.shape != cells:
        raise MismatchError(f"mask is of shape {tuple(mask.shape)}; allowed: one value a cell, {cells}")
    return mask.detach().to(maps.dtype)


def sum_rows(rows: Tensor, weight: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """Return sum(weight · rows) / normalizer.

    Args:
        rows: (n,) one value an anchor; n may be 0, and the result is then a 0 with a gradient path.
        weight: (n,), never receives gradient; None weighs every row 1.
        normalizer: a positive divisor; None divides by 1.
    """
    if weight is not None:
        if weight.shape != rows.shape:
            raise MismatchError(
                f"weight is of shape {tuple(weight.shape)}; allowed: one value a row, {tuple(rows.shape)}"
            )
        rows = rows * weight.detach().to(rows.dtype)
    total = rows.sum()
    return total if normalizer is None else total / normalizer


def average_rows(rows: Tensor, weight: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """Return `sum_rows`, divided by the number of rows when `normalizer` is None."""
    return sum_rows(rows, weight, max(len(rows), 1) if normalizer is None else normalizer)
