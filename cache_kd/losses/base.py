"""In: the heads of teacher and student, then their outputs. Out: one scalar term; every method's interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses.options import Allowed, Option, written
from cache_kd.structures import DetectorOutput, FrozenHead, HeadSpec, TargetBatch

T = TypeVar("T")


class DistillLoss(nn.Module, ABC):
    """A distillation method: its options, its adapters and the term it adds to the student's loss.

    Subclasses list their options as keyword-only arguments of `__init__`, annotated and with defaults, and pass them on
    to this class by name; `allowed` holds the rule of each.

    Attributes:
        name: key in `LOSSES`, file name and `--loss` word.
        title: what the method transfers, in one line.
        paper: title, venue and year.
        needs: what it reads of a cache: "features", "score_map", "logits", "hold_stats", "vlr", or "map:NAME" for the
            map of one tap or layer.
        reads: what it reads beside outputs and targets: "labels", "assignment", "hold" (the student's hold features),
            "head" (the teacher's head, `frozen_head`).
        default_weight: factor of the term when a spec gives none, found on YOLO heads, not the paper's.
        cost: what it adds to a training step.
        protocol: how class logits become probabilities, "-" when the method reads none.
        at_identity: the term at student = teacher (adapters being the identity): "zero"; "stationary", its smallest
            value, above 0; or "other", as said in the method's docstring.
        batch_rule: what repeating every image of a batch does to the term: "mean", nothing; "statistics", a change of
            order 1/n, by unbiased deviations over the n cells of the batch.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    reads: ClassVar[frozenset[str]] = frozenset()
    default_weight: ClassVar[float]
    cost: ClassVar[str]
    protocol: ClassVar[str] = "-"
    at_identity: ClassVar[str] = "zero"
    batch_rule: ClassVar[str] = "mean"
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
        self._head: list[FrozenHead] = []  # in a list: not a child, so neither trained, moved nor saved with the method
        self.class_map: tuple[int, ...] | None = None

    @classmethod
    def check_options(cls, options: Mapping[str, Option]) -> None:
        """Raise `SettingError` for the first value out of range."""
        for key, value in options.items():
            rule = cls.allowed.get(key)
            if rule is not None and not rule.test(value):
                raise SettingError(f"loss {cls.name}: {key}={written(value)} is not allowed; allowed: {rule.text}")

    @classmethod
    def needs_for(cls, options: Mapping[str, Option]) -> frozenset[str]:
        """Return what it reads of a cache when these options are given."""
        return cls.needs

    @classmethod
    def reads_for(cls, options: Mapping[str, Option]) -> frozenset[str]:
        """Return what it reads beside outputs and targets when these options are given."""
        return cls.reads

    @classmethod
    def student_layers(cls, options: Mapping[str, Option]) -> tuple[str, ...]:
        """Return the student's layers, beside the head's inputs, whose outputs it compares."""
        return ()

    def connect(self, head: FrozenHead | None, class_map: tuple[int, ...] | None) -> None:
        """Take the teacher's head, and the teacher's index of each class of the student (None: the same classes)."""
        self._head = [] if head is None else [head]
        self.class_map = class_map

    @property
    def frozen_head(self) -> FrozenHead:
        """The teacher's head; raises `MismatchError` when `connect` brought none."""
        return self.required(self._head[0] if self._head else None, "the teacher's head")

    def parameters_trained_apart(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the method trains itself, which the student's optimizer must not hold."""
        return iter(())

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
