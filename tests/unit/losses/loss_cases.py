"""Heads, student outputs, targets and a teacher's head of small odd-sized maps, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.structures import Assignment, DetectorOutput, HeadSpec, Labels, Tap, TargetBatch

GRIDS = ((5, 7), (3, 4), (1, 2))
BATCH = 2
# Images of the batch, classes and boxes xyxy in pixels: small and large, overlapping, one along the whole view.
LABELS = (
    (0, 0, (2.0, 3.0, 30.0, 20.0)),
    (0, 2, (10.0, 8.0, 18.0, 15.0)),
    (0, 1, (33.5, 12.0, 55.0, 39.0)),
    (1, 1, (0.0, 0.0, 56.0, 40.0)),
    (1, 0, (20.0, 5.0, 29.0, 33.0)),
)
# Channels of the box branch's positions 1 and 2, then of the class branch's; the middle level's are alike.
TEACHER_HOLD, STUDENT_HOLD = (6, 6, 9, 9), (6, 5, 7, 9)


def make_head(
    *channels: int, classes: int = 3, reg_max: int = 16, hold: tuple[int, ...] = TEACHER_HOLD, c4: int = 14
) -> HeadSpec:
    """Return a head of levels P3, P4, … of these channels, beside which a backbone's C4 is known."""
    taps = tuple(Tap(f"P{i + 3}", c, 8 << i) for i, c in enumerate(channels))
    branches = (TEACHER_HOLD if i == 1 else hold for i in range(len(channels)))
    positions = (*channels, *(c for level in branches for c in level))
    return HeadSpec(
        taps, reg_max, tuple(f"class {i}" for i in range(classes)), hold=positions, layers=(Tap("C4", c4, 16),)
    )


@dataclass(frozen=True)
class FakeHead:
    """A teacher's head of one activation and one fixed 1x1 convolution at each level, branch and position."""

    head: HeadSpec

    def finish(self, level: int, branch: str, position: int, hold: Tensor) -> Tensor:
        slot = self.head.hold_slot(level, branch, position)
        rows = {"cls": self.head.num_classes, "box": 4 * self.head.reg_max}[branch]
        generator = torch.Generator().manual_seed(100 + 2 * slot + (branch == "cls"))
        weight = torch.randn(rows, self.head.hold[slot], 1, 1, generator=generator, dtype=torch.float64)
        values = hold.relu() if position else hold
        return F.conv2d(values, (weight / self.head.hold[slot] ** 0.5).to(hold.dtype))

    def outputs(self, position: int, hold: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits (B, A, C) and box logits (B, A, 4·R) of all levels, from a position's hold features."""

        def branch(name: str) -> Tensor:
            slots = [self.head.hold_slot(level, name, position) for level in range(len(self.head.taps))]
            maps = [self.finish(level, name, position, hold[slot]) for level, slot in enumerate(slots)]
            return torch.cat([values.flatten(2) for values in maps], 2).transpose(1, 2)

        return branch("cls"), branch("box")


@dataclass(frozen=True)
class Case:
    """A pair of heads with outputs that fit them, the teacher's hold features, and what finishes them."""

    teacher: HeadSpec
    student: HeadSpec
    output: DetectorOutput
    targets: TargetBatch
    teacher_hold: tuple[Tensor, ...]
    head: FakeHead

    @property
    def student_tensors(self) -> list[Tensor]:
        """All tensors of the student that have a gradient; box logits last."""
        output = self.output
        inner = output.hold[len(output.features) :]
        return [*output.features, *output.layers.values(), *inner, output.scores, output.boxes]


def draw_outputs(head: HeadSpec, seed: int, dtype: torch.dtype, enlarged: int = 1) -> DetectorOutput:
    """Return a head's outputs, its input and hold features and C4; nothing is assigned."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    levels = [(height * enlarged, width * enlarged) for height, width in GRIDS]
    anchors = sum(height * width for height, width in levels)
    features = tuple(normal(BATCH, tap.channels, *grid) for tap, grid in zip(head.taps, levels, strict=True))
    scores, boxes = normal(BATCH, anchors, head.num_classes), normal(BATCH, anchors, 4 * head.reg_max)
    layers = {tap.name: normal(BATCH, tap.channels, *levels[1]) for tap in head.layers}
    grids = [grid for grid in levels for _ in range(2 * head.hold_positions)]
    inner = (normal(BATCH, c, *grid) for c, grid in zip(head.hold[len(head.taps) :], grids, strict=True))
    return DetectorOutput(features, scores, boxes, layers, (*features, *inner))


def hold_statistics(hold: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations over each map's cells, (B, channels of all maps) each."""
    maps = [values.detach().flatten(2) for values in hold]
    means = [values.mean(2) for values in maps]
    squares = [(values - mean[..., None]).square().sum(2) for values, mean in zip(maps, means, strict=True)]
    return torch.cat(means, 1), torch.cat(squares, 1)


def draw_assignment(classes: int, anchors: int, dtype: torch.dtype) -> Assignment:
    """Return about a third of all anchors as positives of random classes and qualities."""
    generator = torch.Generator().manual_seed(4)
    positive = torch.rand(BATCH, anchors, generator=generator) < 0.3
    cls = torch.randint(classes, (BATCH, anchors), generator=generator) * positive
    quality = (1 - torch.rand(BATCH, anchors, generator=generator, dtype=torch.float64)) * positive
    return Assignment(positive, cls, quality.to(dtype))


def make_labels(classes: int, dtype: torch.dtype, rows: slice = slice(None)) -> Labels:
    images, kinds, boxes = zip(*LABELS, strict=True)
    return Labels(
        torch.tensor(images)[rows],
        torch.tensor(kinds)[rows] % classes,
        torch.tensor(boxes, dtype=dtype)[rows].requires_grad_(),
    )


def make_case(*, classes: int = 3, reg_max: int = 16, dtype: torch.dtype = torch.float32, enlarged: int = 1) -> Case:
    """Return a case: channels differ but on the second level; the teacher's tensors ask for gradient.

    Args:
        enlarged: how many times larger than `GRIDS` the maps are.
    """
    teacher = make_head(12, 16, 10, classes=classes, reg_max=reg_max)
    student = make_head(8, 16, 6, classes=classes, reg_max=reg_max, hold=STUDENT_HOLD, c4=11)
    theirs, ours = (draw_outputs(head, seed, dtype, enlarged) for head, seed in ((teacher, 1), (student, 3)))
    anchors = theirs.scores.shape[1]
    mean, m2 = hold_statistics(theirs.hold)
    targets = TargetBatch(
        features=theirs.features,
        scores=theirs.scores,
        boxes=theirs.boxes,
        sent=torch.rand(BATCH, anchors, generator=torch.Generator().manual_seed(2)) > 0.3,
        score_map=theirs.scores.detach().sigmoid().amax(-1).requires_grad_(),
        hold_mean=mean.requires_grad_(),
        hold_m2=m2.requires_grad_(),
        layers=theirs.layers,
        labels=make_labels(classes, dtype),
    )
    output = DetectorOutput(
        ours.features, ours.scores, ours.boxes, ours.layers, ours.hold, draw_assignment(classes, anchors, dtype)
    )
    return Case(teacher, student, output, targets, theirs.hold, FakeHead(teacher))
