"""In: class logits and the class of each row. Out: how far its probability and the others' shares are (NKD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from cache_kd.losses.labelled_rows import LabelledRows
from cache_kd.losses.numeric import average_rows, comparable
from cache_kd.losses.options import Allowed, at_least
from cache_kd.losses.protocols import check_target, is_sigmoid, softmax_cross_entropy, split_target
from cache_kd.structures import HeadSpec


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    protocol: str = "sigmoid",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return Σ_a weight_a · (own_a + γ·T² · others_a) / normalizer, of the row's class y and of the classes c ≠ y.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels", ICCV 2023. others = −Σ_{c≠y} N(t)_c · log N(s)_c, N being probabilities at T divided
    by their sum without y; own is at T = 1. Mean over rows when `normalizer` is None.

    softmax: as the paper and its code, own = −p_t,y · log p_s,y, N is the softmax of the other logits / T. Not at rest
        at student = teacher: own falls until p_s,y = 1. 0 for one class.
    sigmoid: an adaptation. own = BCE(s_y, σ(t_y)) has the half of 1 − p too, without which every y would be drawn to
        p = 1 whatever the teacher says; N(z)_c = σ(z_c/T) / Σ_{j≠y} σ(z_j/T). The minimum, above 0, is at
        student = teacher; one class leaves own alone.

    Both: two classes leave others = 0.

    Args:
        student: (n, K) logits.
        teacher: (n, K) logits, never receives gradient.
        target: (n,) int64, y, 0..K − 1.
        gamma: γ, 1.5 in the paper.
        temperature: T of the other classes, above 0; 1 in the paper's ImageNet settings.
        protocol: "sigmoid" or "softmax".
        weight: (n,) or None for ones.
        normalizer: divisor of the sum; None is n.
    """
    sigmoid = is_sigmoid(protocol)
    student, teacher = comparable(student, teacher)
    check_target(target, *student.shape)
    (our_own, ours), (their_own, theirs) = split_target(student, target), split_target(teacher, target)
    ours, theirs = ours / temperature, theirs / temperature
    if sigmoid:
        own = F.binary_cross_entropy_with_logits(our_own, their_own.sigmoid(), reduction="none")
        # A softmax of log σ is σ over the sum of all σ.
        others = softmax_cross_entropy(F.logsigmoid(ours), F.logsigmoid(theirs))
    else:
        own, _ = split_target(-teacher.softmax(-1) * student.log_softmax(-1), target)
        others = softmax_cross_entropy(ours, theirs)
    return average_rows(own + gamma * temperature**2 * others, weight, normalizer)


class NKD(LabelledRows):
    """`nkd_loss` on anchors that have a class, see `LabelledRows`."""

    name = "nkd"
    title = "the labelled class's probability, and the other classes' shares among themselves"
    paper = (
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels, ICCV 2023"
    )
    default_weight = 0.7
    at_identity = "stationary"
    function = staticmethod(nkd_loss)
    allowed: ClassVar[Mapping[str, Allowed]] = {**LabelledRows.allowed, "gamma": at_least(0)}

    def __init__(
        self,
        teacher: HeadSpec,
        student: HeadSpec,
        *,
        gamma: float = 1.5,
        temperature: float = 1.0,
        protocol: str = "sigmoid",
        region: str = "assigned",
    ) -> None:
        super().__init__(teacher, student, region=region, gamma=gamma, temperature=temperature, protocol=protocol)
