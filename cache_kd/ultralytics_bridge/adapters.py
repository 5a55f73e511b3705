"""In: a student with a distiller. Out: the adapters' part of a step: optimizer groups and a clip of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.student.distiller import Distiller

MAX_NORM = 10.0
"""Largest norm of a step's gradient, Ultralytics' own number, for the student and for its adapters each."""


def distiller_of(model: nn.Module) -> Distiller | None:
    """Return the distiller of a student, which may be wrapped by DDP; None in a plain run."""
    found = unwrap_model(model)._modules.get("kd")
    return found if isinstance(found, Distiller) else None


@contextmanager
def without_distiller(model: nn.Module) -> Iterator[Distiller | None]:
    """Hide the distiller from the stock trainer inside this scope; yields it."""
    student, distiller = unwrap_model(model), distiller_of(model)
    student._modules.pop("kd", None)
    try:
        yield distiller
    finally:
        if distiller is not None:
            student._modules["kd"] = distiller


def add_adapters(optimizer: torch.optim.Optimizer, distiller: Distiller) -> None:
    """Add the adapters in groups of their own, with the settings of the stock groups of their role (never Muon's)."""
    by_role = {group["param_group"]: group for group in optimizer.param_groups}
    for role, chosen in (("weight", True), ("bias", False)):
        members = [p for p in distiller.adapters() if (p.ndim > 1) is chosen]
        if members:
            optimizer.add_param_group({**by_role[role], "params": members})


def clip_apart(model: nn.Module) -> None:
    """Clip the gradients of student and adapters apart: jointly, large ones of adapters shrink the student's step."""
    student = [parameter for name, parameter in unwrap_model(model).named_parameters() if not name.startswith("kd.")]
    torch.nn.utils.clip_grad_norm_(student, max_norm=MAX_NORM)
    distiller = distiller_of(model)
    if distiller is not None and (adapters := distiller.adapters()):
        torch.nn.utils.clip_grad_norm_(adapters, max_norm=MAX_NORM)
