"""In: what the student said and the targets of its batch. Out: the raw distillation terms, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cache_kd.errors import MismatchError
from cache_kd.losses import DistillLoss, LossSpec, build_loss
from cache_kd.structures import DetectorOutput, FrozenHead, HeadSpec, TargetBatch
from cache_kd.views.seeding import random_scope

BALANCE_EVERY = 10
"""Steps between two measurements of the gradients that `balance` holds."""
BALANCE_MOST = 4.0


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

    A term is the mean over the batch's images; the trainer multiplies it by its factor and by the batch size, as the
    detection loss is multiplied by the batch size. A factor is the weight of its spec, times its schedule, times what
    `rebalance` found.

    Args:
        specs: The losses and their weights.
        teacher: The head whose targets are read. student: the head that is trained.
        seed: Seed of the adapters' initial values; the caller's random streams are left as they were.
        head: The teacher's head, for losses that run it.
    """

    def __init__(
        self,
        specs: Sequence[LossSpec],
        teacher: HeadSpec,
        student: HeadSpec,
        *,
        seed: int,
        head: FrozenHead | None = None,
    ) -> None:
        super().__init__()
        self.specs = {spec.name: spec for spec in specs}
        self._layers = tuple(tap.name for tap in student.layers)
        with random_scope(seed):
            self.losses: dict[str, DistillLoss] = {spec.name: build_loss(spec, teacher, student) for spec in specs}
        self.terms = nn.ModuleDict(self.losses)
        on_logits = [spec.name for spec in specs if "logits" in spec.needs]
        self.class_map = match_classes(teacher.names, student.names, needed_by=on_logits)
        for loss in self.losses.values():
            loss.connect(head, self.class_map)
        self._gains = {spec.name: 1.0 for spec in specs}
        self._steps = 0
        self._schedules = {spec.name: spec.schedule(0, 1) for spec in specs}

    @property
    def reads(self) -> frozenset[str]:
        """What the losses read of the student and the labels, see `DistillLoss.reads`."""
        return frozenset[str]().union(*(spec.reads for spec in self.specs.values()))

    @property
    def layers(self) -> tuple[str, ...]:
        """The student's layers, beside the head's inputs, that a loss compares."""
        return self._layers

    def own_layers(self, name: str) -> tuple[str, ...]:
        """Return those of `layers` that one loss compares."""
        return tuple(layer for layer in self.specs[name].student_layers if layer in self._layers)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Take the factors' place in their schedules: `epoch`, from 0, of `epochs`."""
        self._schedules = {name: spec.schedule(epoch, epochs) for name, spec in self.specs.items()}

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each term now; 0 for one that is switched off."""
        return {name: spec.weight * self._gains[name] * self._schedules[name] for name, spec in self.specs.items()}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the terms that are not switched off by their schedule."""
        return tuple(name for name, factor in self._schedules.items() if factor)

    def adapters(self) -> list[nn.Parameter]:
        """Return the parameters that belong in the student's optimizer."""
        apart = {id(p) for loss in self.losses.values() for p in loss.parameters_trained_apart()}
        return [parameter for parameter in self.parameters() if id(parameter) not in apart]

    def not_finite(self, name: str) -> list[str]:
        """Return the names of a loss's own weights and buffers that hold NaN or infinity."""
        return [key for key, value in self.losses[name].state_dict().items() if not value.isfinite().all()]

    def forward(self, student: DetectorOutput, targets: TargetBatch) -> dict[str, Tensor]:
        """Return {name: raw term} of the active terms; gradient flows to the student and the adapters only."""
        said = _in_float32(student)
        if self.class_map is not None and targets.scores is not None:
            targets = replace(targets, scores=targets.scores[..., list(self.class_map)])
        with torch.autocast(said.scores.device.type, enabled=False):
            return {name: self.losses[name](said, targets) for name in self.active}

    def due(self) -> bool:
        """Count a step and return whether the gradients of the terms are to be measured for `rebalance` in it."""
        self._steps += 1
        balanced = any(spec.balance for name, spec in self.specs.items() if name in self.active)
        # Often at first, while the weights are only guesses.
        return balanced and (self._steps <= BALANCE_EVERY or self._steps % BALANCE_EVERY == 0)

    def rebalance(self, shares: Mapping[str, float]) -> None:
        """Move each balanced term's factor towards the one at which its share of the gradient is its target.

        Half of the way on a logarithmic scale, at most fourfold: one batch's gradients are noisy. A schedule lowers the
        ratio of the gradients by as much as it lowers the factor.
        """
        for name, spec in self.specs.items():
            share = shares.get(name, 0.0)
            if not spec.balance or not 0 < share < 1 or not self._schedules[name]:
                continue
            wanted = spec.balance / (1 - spec.balance) * self._schedules[name]
            change = math.sqrt(wanted * (1 - share) / share)
            self._gains[name] *= min(max(change, 1 / BALANCE_MOST), BALANCE_MOST)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a resumed run goes on with beside the adapters: plain numbers."""
        return {"gains": dict(self._gains), "steps": self._steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` returned."""
        self._gains, self._steps = dict(state["gains"]), int(state["steps"])


def _in_float32(said: DetectorOutput) -> DetectorOutput:
    return replace(
        said,
        features=tuple(level.float() for level in said.features),
        scores=said.scores.float(),
        boxes=said.boxes.float(),
        layers={name: layer.float() for name, layer in said.layers.items()},
        hold=tuple(hold.float() for hold in said.hold),
    )
