"""In: class logits and the class of each row. Out: KD weighed by how far the student lags behind the teacher (WSLD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.losses.labelled_rows import LabelledRows
from cache_kd.losses.numeric import average_rows, comparable
from cache_kd.losses.options import Allowed, at_least
from cache_kd.losses.protocols import binary_divergence, check_target, is_sigmoid, softmax_cross_entropy, split_target
from cache_kd.structures import HeadSpec

EPSILON = 1e-7


def wsld_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.5,
    temperature: float = 2.0,
    protocol: str = "sigmoid",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return α · T² · Σ_a weight_a · f_a · row_a / normalizer with f = 1 − exp(−L_s / (L_t + 1e-7)).

    Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", ICLR 2021.
    L_s and L_t are what student and teacher lose on the row's class y, at T = 1; f receives no gradient. Mean over rows
    when `normalizer` is None.

    softmax: as the paper and its code, row = −Σ_c p_t,c · log p_s,c of p = softmax(z/T), a cross-entropy, and
        L = −log softmax(z)_y. Smallest in each row for given f, above 0, at student = teacher. 0 for one class.
    sigmoid: an adaptation. row = Σ_c KL(Bern(σ(t_c/T)) ‖ Bern(σ(s_c/T))) and L = Σ_c BCE(z_c, [c = y]). The divergence
        instead of the cross-entropy takes off what has no gradient, f being given, and makes student = teacher 0.

    Args:
        student: (n, K) logits.
        teacher: (n, K) logits, never receives gradient.
        target: (n,) int64, y, 0..K − 1.
        alpha: α, 2.5 in the paper's ImageNet settings (no detection values are known).
        temperature: T, above 0; 2 in the paper's ImageNet settings.
        protocol: "sigmoid" or "softmax".
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is n.
    """
    sigmoid = is_sigmoid(protocol)
    student, teacher = comparable(student, teacher)
    check_target(target, *student.shape)
    ours, theirs = student / temperature, teacher / temperature
    rows = binary_divergence(ours, theirs).sum(-1) if sigmoid else softmax_cross_entropy(ours, theirs)
    with torch.no_grad():
        lag = _label_loss(student, target, sigmoid) / (_label_loss(teacher, target, sigmoid) + EPSILON)
        factor = -torch.expm1(-lag)
    return average_rows(alpha * temperature**2 * factor * rows, weight, normalizer)


def _label_loss(logits: Tensor, target: Tensor, sigmoid: bool) -> Tensor:
    if not sigmoid:
        return -split_target(logits.log_softmax(-1), target)[0]
    own, others = split_target(logits, target)
    return -F.logsigmoid(own) - F.logsigmoid(-others).sum(-1)


class WSLD(LabelledRows):
    """`wsld_loss` on anchors that have a class, see `LabelledRows`."""

    name = "wsld"
    title = "class probabilities, most where the student is further from the label than the teacher"
    paper = "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective, ICLR 2021"
    default_weight = 0.7
    function = staticmethod(wsld_loss)
    allowed: ClassVar[Mapping[str, Allowed]] = {**LabelledRows.allowed, "alpha": at_least(0)}

    def __init__(
        self,
        teacher: HeadSpec,
        student: HeadSpec,
        *,
        alpha: float = 2.5,
        temperature: float = 2.0,
        protocol: str = "sigmoid",
        region: str = "assigned",
    ) -> None:
        super().__init__(teacher, student, region=region, alpha=alpha, temperature=temperature, protocol=protocol)
