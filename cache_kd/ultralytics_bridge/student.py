"""In: a student and a distiller. Out: the same student whose training loss has more terms, and whose copies do not."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache_kd.structures import Assignment, DetectorOutput, Labels, TargetBatch
from cache_kd.student.alarms import gradient_shares
from cache_kd.student.distiller import Distiller
from cache_kd.ultralytics_bridge.heads import detector_output, hold_layers
from cache_kd.ultralytics_bridge.layers import captured, find_layers

TARGETS = "kd_targets"
"""Key of a prepared batch that holds its `TargetBatch`."""


class DistilledMixin:
    """Adds the distillation terms to a detection model's training loss.

    The distiller is a child module in memory only: deep copies (EMA) and pickles (checkpoints) are the stock class
    without it, so best.pt opens where cache-kd is not installed.
    """

    kd: Distiller
    kd_seen: list[tuple[dict[str, Tensor], Tensor, str]]
    kd_shares: dict[str, float] | None = None
    kd_weights: dict[str, float]
    kd_measure: bool = False
    kd_layers: dict[str, nn.Module]
    _kd_base: type[nn.Module]

    def loss(self, batch: dict[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        targets: TargetBatch | None = batch.get(TARGETS)
        if not self.training or targets is None:  # type: ignore[attr-defined]  # an nn.Module beside this mixin
            return super().loss(batch, preds)  # type: ignore[misc,no-any-return]  # as above
        detection, items, said = self._observed_loss(batch, preds)
        raw = self.kd(said, replace(targets, labels=batch_labels(batch)))
        # Ultralytics' losses are sums over the batch, its logged items are means.
        images = batch["img"].shape[0]
        weights = self.kd.weights
        weighted = {name: term * weights[name] for name, term in raw.items()}
        # Judged by the outputs, not by the loss, which a faulty term would make infinite too. No wait for the device.
        # A sum is finite where all its terms are, and a fortieth of the work of looking at each.
        sums = [out.detach().sum(dtype=torch.float32) for out in (said.scores, said.boxes)]
        finite = torch.stack(sums).sum().isfinite()
        self.kd_seen.append(({name: term.detach() for name, term in raw.items()}, finite, _place(batch)))
        self._measure(detection, {name: term * images for name, term in weighted.items()}, said)
        total = torch.cat([detection.reshape(-1), *(term.reshape(1) * images for term in weighted.values())])
        # A term that is switched off keeps its column.
        zero = torch.zeros((), device=detection.device)
        logged = {f"{name}_loss": weighted.get(name, zero).detach() for name in weights}
        return total, {**items, **logged}

    def _observed_loss(self, batch: dict[str, Any], preds: Any) -> tuple[Tensor, dict[str, Tensor], DetectorOutput]:
        """Return the detection loss, its items, and everything that the losses read of the student."""
        reads = self.kd.reads
        hooked = {**self.kd_layers, **(_holds(self) if "hold" in reads else {})}
        with captured(hooked) as found:
            preds = self.forward(batch["img"]) if preds is None else preds  # type: ignore[attr-defined]  # as above
        if getattr(self, "criterion", None) is None:
            self.criterion = self.init_criterion()  # type: ignore[attr-defined]  # as above
        with _assigned(self.criterion) as assigned:
            detection, items = super().loss(batch, preds)  # type: ignore[misc]  # as above
        said = detector_output(preds)
        hold = tuple(found[name] for name in hooked if name not in self.kd_layers)
        return (
            detection,
            items,
            replace(
                said,
                layers={name: found[name] for name in self.kd_layers},
                hold=(*said.features, *hold) if hold else (),
                assigned=assigned[0] if "assignment" in reads else None,
            ),
        )

    def _measure(self, detection: Tensor, weighted: dict[str, Tensor], said: DetectorOutput) -> None:
        """Measure the terms' shares of the gradient once an epoch, and as often as a balance asks for."""
        due = self.kd.due()
        if not (due or self.kd_measure):
            return
        own = {name: {key: said.layers[key] for key in self.kd.own_layers(name)} for name in weighted}
        shares = gradient_shares(detection.sum(), weighted, said.features, own)
        if self.kd_measure:
            # The factors that gave these shares: a balance changes them next.
            self.kd_measure, self.kd_shares, self.kd_weights = False, shares, self.kd.weights
        if due:
            self.kd.rebalance(shares)

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
    # In the instance's dictionary only: as an attribute, a mapping of modules is no child of the model.
    model.kd_layers = find_layers(model, distiller.layers, "the student")  # type: ignore[assignment]  # as said
    return model


def _place(batch: Mapping[str, Any]) -> str:
    """Return epoch, view and first images of a batch, for messages; nothing of one that our loader did not make."""
    if "kd_view" not in batch:
        return ""
    images = [Path(file).name for file in batch["im_file"]]
    shown = ", ".join(images[:3]) + (", …" if len(images) > 3 else "")
    return f"epoch {batch['kd_epoch'] + 1}, view {batch['kd_view'].name}, images {shown}"


def batch_labels(batch: Mapping[str, Any]) -> Labels:
    """Return the labels of a prepared batch, boxes in pixels of the view."""
    height, width = batch["img"].shape[-2:]
    centre_size = batch["bboxes"].float() * batch["bboxes"].new_tensor([width, height, width, height]).float()
    centre, half = centre_size[:, :2], centre_size[:, 2:] / 2
    return Labels(
        image=batch["batch_idx"].long().to(centre.device),
        cls=batch["cls"].view(-1).long().to(centre.device),
        boxes=torch.cat([centre - half, centre + half], dim=1),
    )


def _holds(model: Any) -> dict[str, nn.Module]:
    return {f"hold {number}": layer for number, layer in enumerate(hold_layers(model.model[-1]))}


@contextmanager
def _assigned(criterion: Any) -> Iterator[list[Assignment]]:
    """Collect what the assigner of the (one-to-many) loss decides inside."""
    found: list[Assignment] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        labels, _, scores, positive, _ = output
        positive = positive.bool()
        quality = scores.amax(-1).float()
        found.append(Assignment(positive, torch.where(positive, labels.long(), 0), torch.where(positive, quality, 0.0)))

    handle = getattr(criterion, "one2many", criterion).assigner.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
