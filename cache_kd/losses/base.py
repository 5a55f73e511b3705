"""In: the heads of teacher and student, then their outputs. Out: one scalar term; every method's interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses.options import Allowed, Option
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

T = TypeVar("T")


class DistillLoss(nn.Module, ABC):
    """A distillation method: its options, its adapters and the term it adds to the student's loss.

    Subclasses list their options as keyword-only arguments of `__init__`, annotated and with defaults, and pass them on
    to this class by name; `allowed` holds the rule of each.

    Attributes:
        name: key in `LOSSES`, file name and `--loss` word.
        title: what the method transfers, in one line.
        paper: title, venue and year.
        needs: what it reads of a cache: "features", "score_map", "logits".
        default_weight: factor of the term when a spec gives none, found on YOLO heads, not the paper's.
        cost: what it adds to a training step.
        protocol: how class logits become probabilities, "-" when the method reads none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    default_weight: ClassVar[float]
    cost: ClassVar[str]
    protocol: ClassVar[str] = "-"
    allowed: ClassVar[Mapping[str, Allowed]] = {}

    def __init__(self, teacher: HeadSpec, student: HeadSpec, **options: Option) -> None:
        """Check options and heads.

        Raises:
            SettingError: an option is out of its range.
            MismatchError: the heads have other levels, or cannot be compared by this method.
        """
        super().__init__()
        self.check_options(options)
        self._check_levels(teacher, student)

    @classmethod
    def check_options(cls, options: Mapping[str, Option]) -> None:
        """Raise `SettingError` for the first value out of range."""
        for key, value in options.items():
            rule = cls.allowed.get(key)
            if rule is not None and not rule.test(value):
                raise SettingError(f"loss {cls.name}: {key}={value} is not allowed; allowed: {rule.text}")

    def forward(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        """Return the raw term, a scalar on the scale of a mean over images, computed in float32 at least.

        Args:
            student: outputs of the student, with gradient.
            targets: the teacher's outputs of the same views; class columns in the student's order.
        """
        with torch.autocast(student.scores.device.type, enabled=False):
            return self.term(student, targets)

    @abstractmethod
    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        """Compute the term; autocast is off."""

    def required(self, value: T | None, what: str) -> T:
        """Return a target that the method cannot do without; raises `MismatchError` when it was not read."""
        if value is None:
            raise MismatchError(
                f"loss {self.name} needs {what}, which this batch of targets lacks; "
                "extract with --store features,logits or choose another loss: cache-kd losses"
            )
        return value

    def _check_levels(self, teacher: HeadSpec, student: HeadSpec) -> None:
        ours, theirs = (tuple(tap.stride for tap in head.taps) for head in (student, teacher))
        if ours != theirs:
            raise MismatchError(
                f"loss {self.name}: strides of the student's levels are {_listed(ours)}, "
                f"the teacher's {_listed(theirs)}; allowed: equal strides in equal order; "
                "choose a student whose head has the teacher's levels"
            )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"
