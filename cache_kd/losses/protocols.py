"""In: class logits of rows, and a class a row. Out: what sigmoid and softmax make of them, for KD and its kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_kd.errors import MismatchError, SettingError, choices

PROTOCOLS = ("sigmoid", "softmax")


def is_sigmoid(protocol: str) -> bool:
    """Return whether K sigmoids are meant, False for one softmax; raises `SettingError` for any other word."""
    if protocol not in PROTOCOLS:
        raise SettingError(f"no protocol {protocol!r}; {choices(protocol, PROTOCOLS)}")
    return protocol == "sigmoid"


def refuse_softmax_of_one(name: str, protocol: str, classes: int) -> None:
    """Raise `SettingError` for the softmax of one class, which is 1 whatever the logit: the term would always be 0."""
    if protocol == "softmax" and classes == 1:
        raise SettingError(
            f"loss {name}: protocol=softmax with one class is constantly zero; allowed here: sigmoid; "
            f"use --loss {name}:protocol=sigmoid"
        )


def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(Bern(σ(teacher)) ‖ Bern(σ(student))) of each pair of logits, in their shape."""
    # -logsigmoid(-x) is log(1 + e^x); F.softplus turns linear above 20, which float64 would notice.
    change = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return teacher.sigmoid() * (teacher - student) + change


def softmax_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher) ‖ softmax(student)) over the last axis, (n,) of (n, K); 0 where K is 0 or 1."""
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def softmax_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Return −Σ_c softmax(teacher)_c · log softmax(student)_c, (n,) of (n, K); 0 where K is 0 or 1."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


def check_target(target: Tensor, rows: int, classes: int) -> None:
    """Raise `MismatchError` unless `target` holds one class index a row."""
    if target.shape != (rows,) or target.dtype != torch.int64:
        raise MismatchError(
            f"target is {target.dtype} of shape {tuple(target.shape)}; "
            f"allowed: one class index a row, torch.int64 of shape ({rows},)"
        )
    wrong = target[(target < 0) | (target >= classes)]
    if wrong.numel():
        raise MismatchError(f"target has class {int(wrong[0])}; allowed: 0 to {classes - 1}, the columns of the logits")


def split_target(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's column, (n,), and all others in their order, (n, K − 1), of `values` (n, K)."""
    columns = torch.arange(values.shape[-1] - 1, device=values.device)
    others = columns + (columns >= target[:, None])
    return values.gather(-1, target[:, None]).squeeze(-1), values.gather(-1, others)
