"""Heads, student outputs and targets of small odd-sized maps, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cache_kd.structures import DetectorOutput, HeadSpec, Tap, TargetBatch

pytest.register_assert_rewrite("function_suite")

GRIDS = ((5, 7), (3, 4), (1, 2))
ANCHORS = sum(h * w for h, w in GRIDS)
BATCH = 2


def make_head(*channels: int, classes: int = 3, reg_max: int = 16) -> HeadSpec:
    taps = tuple(Tap(f"P{i + 3}", c, 8 << i) for i, c in enumerate(channels))
    return HeadSpec(taps, reg_max, tuple(f"class {i}" for i in range(classes)))


@dataclass(frozen=True)
class Case:
    """A pair of heads with outputs that fit them."""

    teacher: HeadSpec
    student: HeadSpec
    output: DetectorOutput
    targets: TargetBatch

    @property
    def student_tensors(self) -> list[Tensor]:
        return [*self.output.features, self.output.scores, self.output.boxes]


def draw_outputs(
    head: HeadSpec, seed: int, dtype: torch.dtype = torch.float32, grad: bool = True
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    features = tuple(normal(BATCH, tap.channels, *grid) for tap, grid in zip(head.taps, GRIDS, strict=True))
    return features, normal(BATCH, ANCHORS, head.num_classes), normal(BATCH, ANCHORS, 4 * head.reg_max)


@pytest.fixture
def head() -> Callable[..., HeadSpec]:
    return make_head


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Return a builder: channels differ but on the second level; the teacher's tensors ask for gradient."""

    def build(*, classes: int = 3, reg_max: int = 16, dtype: torch.dtype = torch.float32) -> Case:
        teacher = make_head(12, 16, 10, classes=classes, reg_max=reg_max)
        student = make_head(8, 16, 6, classes=classes, reg_max=reg_max)
        features, scores, boxes = draw_outputs(teacher, 1, dtype)
        sent = torch.rand(BATCH, ANCHORS, generator=torch.Generator().manual_seed(2)) > 0.3
        score_map = scores.detach().sigmoid().amax(-1).requires_grad_()
        targets = TargetBatch(features, scores, boxes, sent, score_map)
        return Case(teacher, student, DetectorOutput(*draw_outputs(student, 3, dtype)), targets)

    return build
