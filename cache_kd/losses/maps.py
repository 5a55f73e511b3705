"""In: outputs and targets. Out: the pairs of maps that a method compares, and 1x1 convolutions between their widths."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from cache_kd.errors import MismatchError, choices
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.numeric import at_least_float32
from cache_kd.losses.options import LAYERS, Allowed, Option
from cache_kd.structures import DetectorOutput, HeadSpec, Tap, TargetBatch


class MapLoss(DistillLoss, ABC):
    """A method that compares maps, one pair after the other.

    The pairs are the head's inputs P3, P4, P5, or those that `layers` names, in its order.

    Attributes:
        pairs: (student's tap, teacher's tap) of each pair; strides are equal.
    """

    needs = frozenset({"features"})
    allowed: ClassVar[Mapping[str, Allowed]] = {"layers": LAYERS}

    def __init__(
        self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = (), **options: Option
    ) -> None:
        super().__init__(teacher, student, layers=layers, **options)
        named = layer_pairs(layers) or [(tap.name, tap.name) for tap in teacher.taps]
        self.pairs = tuple(
            (self._tap(student, ours, "student"), self._tap(teacher, theirs, "teacher")) for ours, theirs in named
        )
        self._levels = {tap.name: level for level, tap in enumerate(teacher.taps)}
        for ours, theirs in self.pairs:
            if ours.stride != theirs.stride:
                raise MismatchError(
                    f"loss {self.name}: the student's {ours.name} has stride {ours.stride}, the teacher's "
                    f"{theirs.name} has {theirs.stride}; allowed: layers of equal stride, named TEACHER:STUDENT"
                )

    @classmethod
    def needs_for(cls, options: Mapping[str, Option]) -> frozenset[str]:
        named = layer_pairs(options.get("layers", ()))
        return cls.needs - {"features"} | {f"map:{theirs}" for _, theirs in named} if named else cls.needs

    @classmethod
    def student_layers(cls, options: Mapping[str, Option]) -> tuple[str, ...]:
        return tuple(ours for ours, _ in layer_pairs(options.get("layers", ())))

    def maps(self, student: DetectorOutput, targets: TargetBatch) -> list[tuple[Tensor, Tensor]]:
        """Return (student's map, teacher's map) of each pair, (N, F, H, W), the student's in float32 at least."""
        return [
            (
                at_least_float32(self._map(student.features, student.layers, ours, "student")),
                self._map(targets.features, targets.layers, theirs, "teacher"),
            )
            for ours, theirs in self.pairs
        ]

    def levels_of_strides(self, head: HeadSpec) -> tuple[int, ...]:
        """Return for each pair the head's level of its stride; raises `MismatchError` where there is none."""
        strides = [tap.stride for tap in head.taps]
        for _, theirs in self.pairs:
            if theirs.stride not in strides:
                raise MismatchError(
                    f"loss {self.name} looks at each layer by the head's level of its stride, {theirs.name} has stride "
                    f"{theirs.stride}; allowed: layers of stride {', '.join(map(str, strides))}"
                )
        return tuple(strides.index(theirs.stride) for _, theirs in self.pairs)

    def _map(self, levels: tuple[Tensor, ...] | None, layers: Mapping[str, Tensor], tap: Tap, whose: str) -> Tensor:
        level = self._levels.get(tap.name)
        if level is None:
            return self.required(layers.get(tap.name), f"the {whose}'s layer {tap.name}")
        return self.required(levels, f"the {whose}'s features")[level]

    def _tap(self, head: HeadSpec, name: str, whose: str) -> Tap:
        tap = head.tap(name)
        if tap is None:
            known = [each.name for each in (*head.taps, *head.layers)]
            raise MismatchError(f"loss {self.name}: the {whose} has no layer {name!r}; {choices(name, known)}")
        return tap


def layer_pairs(layers: Option) -> list[tuple[str, str]]:
    """Return (student's layer, teacher's layer) of each entry "P3" or "TEACHER:STUDENT" of the option `layers`."""
    assert isinstance(layers, tuple)
    pairs = [entry.partition(":") for entry in layers]
    return [(ours or theirs, theirs) for theirs, _, ours in pairs]


def channel_adapters(pairs: Sequence[tuple[Tap, Tap]], *, bias: bool = True) -> nn.ModuleList:
    """Return for each pair the identity where channels agree, else a 1x1 convolution to the teacher's channels."""
    return nn.ModuleList(
        nn.Identity() if ours.channels == theirs.channels else nn.Conv2d(ours.channels, theirs.channels, 1, bias=bias)
        for ours, theirs in pairs
    )
