"""In: what the student said and the targets of its batch. Out: the raw distillation terms, each with its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cache_kd.errors import MismatchError
from cache_kd.losses import LossSpec, build_loss
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch
from cache_kd.views.seeding import random_scope


def match_classes(
    teacher: Sequence[str], student: Sequence[str], *, needed_by: Sequence[str]
) -> tuple[int, ...] | None:
    """Return, for each class of the student, the teacher's index of the class of that name; None if all agree.

    Args:
        needed_by: Names of the losses that read class logits; without any, unmatched classes do not matter.

    Raises:
        MismatchError: A loss on logits is wanted and the teacher lacks a class of the student.
    """
    if tuple(teacher) == tuple(student):
        return None
    index = {name: position for position, name in enumerate(teacher)}
    missing = [name for name in student if name not in index]
    if not missing:
        return tuple(index[name] for name in student)
    if not needed_by:
        return None
    raise MismatchError(
        f"the teacher does not know the classes {', '.join(missing[:5])}, which {' and '.join(needed_by)} would need; "
        f"it knows {', '.join(list(teacher)[:5])}{', …' if len(teacher) > 5 else ''}; use one on features: --loss cwd"
    )


class Distiller(nn.Module):
    """Owns the losses with their adapters and computes every raw term of one batch in float32.

    A term is the mean over the batch's images; the trainer multiplies it by its weight and by the batch size, as the
    detection loss is multiplied by the batch size.

    Args:
        specs: The losses and their weights.
        teacher: The head whose targets are read. student: the head that is trained.
        seed: Seed of the adapters' initial values; the caller's random streams are left as they were.
    """

    def __init__(self, specs: Sequence[LossSpec], teacher: HeadSpec, student: HeadSpec, *, seed: int) -> None:
        super().__init__()
        with random_scope(seed):
            self.terms = nn.ModuleDict({spec.name: build_loss(spec, teacher, student) for spec in specs})
        self.weights = {spec.name: spec.weight for spec in specs}
        on_logits = [name for name, loss in self.terms.items() if "logits" in loss.needs]  # type: ignore[operator]  # a frozenset of DistillLoss
        self.class_map = match_classes(teacher.names, student.names, needed_by=on_logits)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the targets that the losses read."""
        return frozenset[str]().union(*(loss.needs for loss in self.terms.values()))  # type: ignore[arg-type]  # as above

    def forward(self, student: DetectorOutput, targets: TargetBatch) -> dict[str, Tensor]:
        """Return {name: raw term}; gradient flows to the student and the adapters only."""
        said = DetectorOutput(
            tuple(level.float() for level in student.features), student.scores.float(), student.boxes.float()
        )
        if self.class_map is not None and targets.scores is not None:
            targets = replace(targets, scores=targets.scores[..., list(self.class_map)])
        with torch.autocast(said.scores.device.type, enabled=False):
            return {name: loss(said, targets) for name, loss in self.terms.items()}
