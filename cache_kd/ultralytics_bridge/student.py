"""In: a student and a distiller. Out: the same student whose training loss has more terms, and whose copies do not."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cache_kd.structures import TargetBatch
from cache_kd.student.alarms import gradient_shares
from cache_kd.student.distiller import Distiller
from cache_kd.ultralytics_bridge.heads import detector_output

TARGETS = "kd_targets"
"""Key of a prepared batch that holds its `TargetBatch`."""


class DistilledMixin:
    """Adds the distillation terms to a detection model's training loss.

    The distiller is a child module in memory only: deep copies (EMA) and pickles (checkpoints) are the stock class
    without it, so best.pt opens where cache-kd is not installed.
    """

    kd: Distiller
    kd_seen: list[tuple[dict[str, Tensor], Tensor]]
    kd_shares: dict[str, float] | None = None
    kd_measure: bool = False
    _kd_base: type[nn.Module]

    def loss(self, batch: dict[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        targets: TargetBatch | None = batch.get(TARGETS)
        if not self.training or targets is None:  # type: ignore[attr-defined]  # an nn.Module beside this mixin
            return super().loss(batch, preds)  # type: ignore[misc,no-any-return]  # as above
        preds = self.forward(batch["img"]) if preds is None else preds  # type: ignore[attr-defined]  # as above
        detection, items = super().loss(batch, preds)  # type: ignore[misc]  # as above
        said = detector_output(preds)
        raw = self.kd(said, targets)
        # Ultralytics' losses are sums over the batch, its logged items are means.
        images = batch["img"].shape[0]
        weighted = {name: term * self.kd.weights[name] for name, term in raw.items()}
        # Judged by the outputs, not by the loss, which a faulty term would make infinite too. No wait for the device.
        finite = torch.stack([said.scores.isfinite().all(), said.boxes.isfinite().all()]).all()
        self.kd_seen.append(({name: term.detach() for name, term in raw.items()}, finite))
        if self.kd_measure:
            self.kd_measure = False
            scaled = {name: term * images for name, term in weighted.items()}
            self.kd_shares = gradient_shares(detection.sum(), scaled, said.features)
        total = torch.cat([detection.reshape(-1), torch.stack(list(weighted.values())) * images])
        return total, {**items, **{f"{name}_loss": term.detach() for name, term in weighted.items()}}

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__dict__.items() if not key.startswith("kd_")}
        state["_modules"] = {name: module for name, module in state["_modules"].items() if name != "kd"}
        return copyreg.__newobj__, (self._kd_base,), state  # type: ignore[attr-defined]  # typeshed lacks it

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # The trainer's recovery from NaN loads a student's state, strictly.
        if not any(name.startswith("kd.") for name in state_dict):
            state_dict = {**state_dict, **{f"kd.{name}": value for name, value in self.kd.state_dict().items()}}
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]  # an nn.Module beside this


def attach_distiller(model: nn.Module, distiller: Distiller) -> nn.Module:
    """Return `model` itself with the distiller as its child `kd` and the terms in its loss."""
    base = type(model)
    model.__class__ = type(f"Distilled{base.__name__}", (DistilledMixin, base), {"_kd_base": base, "kd_seen": []})
    model.kd = distiller
    return model
