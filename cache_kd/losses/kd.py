"""In: class logits. Out: the divergence of the class probabilities (KD), read as K sigmoids or as one softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from cache_kd.losses.anchors import confidence, total_confidence
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.numeric import average_rows, comparable
from cache_kd.losses.options import Allowed, above, one_of
from cache_kd.losses.protocols import (
    PROTOCOLS,
    binary_divergence,
    is_sigmoid,
    refuse_softmax_of_one,
    softmax_divergence,
)
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 2.0,
    protocol: str = "sigmoid",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return T² · Σ_rows weight · KL(teacher ‖ student) / normalizer.

    sigmoid: a row is Σ_c KL(Bern(σ(t_c/T)) ‖ Bern(σ(s_c/T))), the form fit for heads trained with binary cross-entropy.
    softmax: a row is KL(softmax(t/T) ‖ softmax(s/T)), as in Hinton et al., "Distilling the Knowledge in a Neural
    Network", NIPS 2014 workshop; blind to a constant added to all logits of a row, and always 0 for one class.
    Sum over classes; mean over rows when `normalizer` is None. 0 at student = teacher. Code of detectors differs by
    scale: that of LD and BCKD takes the mean over classes. T = 2 is theirs too.

    Args:
        student: (n, K) logits.
        teacher: (n, K) logits, never receives gradient.
        temperature: T, above 0.
        protocol: "sigmoid" or "softmax".
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is n.
    """
    sigmoid = is_sigmoid(protocol)
    student, teacher = comparable(student, teacher)
    ours, theirs = student / temperature, teacher / temperature
    rows = binary_divergence(ours, theirs).sum(-1) if sigmoid else softmax_divergence(ours, theirs)
    return average_rows(rows * temperature**2, weight, normalizer)


class KD(DistillLoss):
    """`kd_loss` over all anchors, divided by Z = max(Σ max_c p_t, 1) over the batch.

    The default temperature is 1, not the function's 2: higher ones give weight to the logits of empty background,
    nearly all anchors, and those are the ones that a sparse cache keeps only as a mean.
    """

    name = "kd"
    title = "class probabilities at every anchor"
    paper = "Distilling the Knowledge in a Neural Network, NIPS 2014 workshop"
    needs = frozenset({"logits"})
    default_weight = 0.7
    cost = "elementwise on the class logits"
    protocol = "sigmoid"
    allowed: ClassVar[Mapping[str, Allowed]] = {"temperature": above(0), "protocol": one_of(*PROTOCOLS)}

    def __init__(
        self, teacher: HeadSpec, student: HeadSpec, *, temperature: float = 1.0, protocol: str = "sigmoid"
    ) -> None:
        super().__init__(teacher, student, temperature=temperature, protocol=protocol)
        refuse_softmax_of_one(self.name, protocol, student.num_classes)
        self.temperature = temperature
        self.mode = protocol

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        scores = self.required(targets.scores, "logits")
        return kd_loss(
            student.scores.flatten(0, 1),
            scores.flatten(0, 1),
            temperature=self.temperature,
            protocol=self.mode,
            normalizer=total_confidence(confidence(scores)),
        )
