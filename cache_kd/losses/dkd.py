"""In: class logits and the class of each row. Out: the divergences of its class and of the others, apart (DKD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from cache_kd.losses.labelled_rows import LabelledRows
from cache_kd.losses.numeric import average_rows, comparable
from cache_kd.losses.options import Allowed, at_least
from cache_kd.losses.protocols import (
    binary_divergence,
    check_target,
    is_sigmoid,
    softmax_divergence,
    split_target,
)
from cache_kd.structures import HeadSpec


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.25,
    temperature: float = 1.0,
    protocol: str = "sigmoid",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return T² · Σ_a weight_a · (α · own_a + β · others_a) / normalizer, of the row's class y and of the rest, c ≠ y.

    Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. Mean over rows when `normalizer` is None. 0 at
    student = teacher.

    softmax: as in the paper, own = KL(b_t ‖ b_s) of b = (p_y, 1 − p_y), others = KL(q_t ‖ q_s) of the softmax q over
        the classes c ≠ y; KD is own + (1 − p_t,y) · others. The authors' code removes y by logits − 1000 and takes
        log(softmax), which is infinite for logits far apart; here y is left out and b is read as the sigmoid of
        z_y − log Σ_{c≠y} exp z_c. 0 for one class, where the authors' code gives NaN.
    sigmoid: an adaptation. With b_c = KL(Bern(σ(t_c/T)) ‖ Bern(σ(s_c/T))), own = b_y and others = Σ_{c≠y} b_c;
        α = β = 1 is `kd_loss`. One class leaves own alone.

    Args:
        student: (n, K) logits.
        teacher: (n, K) logits, never receives gradient.
        target: (n,) int64, y, 0..K − 1.
        alpha: α. beta: β. 1 and 0.25 on COCO; the paper has 8 for β on CIFAR-100, 0.5 on ImageNet.
        temperature: T, above 0; 1 on COCO.
        protocol: "sigmoid" or "softmax".
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is n.
    """
    sigmoid = is_sigmoid(protocol)
    student, teacher = comparable(student, teacher)
    check_target(target, *student.shape)
    our_own, ours = split_target(student / temperature, target)
    their_own, theirs = split_target(teacher / temperature, target)
    if sigmoid:
        own, others = binary_divergence(our_own, their_own), binary_divergence(ours, theirs).sum(-1)
    elif ours.shape[-1]:
        own = binary_divergence(our_own - ours.logsumexp(-1), their_own - theirs.logsumexp(-1))
        others = softmax_divergence(ours, theirs)
    else:
        own = others = ours.sum(-1)
    return average_rows((alpha * own + beta * others) * temperature**2, weight, normalizer)


class DKD(LabelledRows):
    """`dkd_loss` on anchors that have a class, see `LabelledRows`."""

    name = "dkd"
    title = "the labelled class's probability and the other classes', weighed apart"
    paper = "Decoupled Knowledge Distillation, CVPR 2022"
    default_weight = 3.0
    function = staticmethod(dkd_loss)
    allowed: ClassVar[Mapping[str, Allowed]] = {**LabelledRows.allowed, "alpha": at_least(0), "beta": at_least(0)}

    def __init__(
        self,
        teacher: HeadSpec,
        student: HeadSpec,
        *,
        alpha: float = 1.0,
        beta: float = 0.25,
        temperature: float = 1.0,
        protocol: str = "sigmoid",
        region: str = "assigned",
    ) -> None:
        super().__init__(
            teacher, student, region=region, alpha=alpha, beta=beta, temperature=temperature, protocol=protocol
        )
