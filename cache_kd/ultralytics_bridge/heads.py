"""In: a detection model. Out: its head's description, its raw outputs in one form, the head's hold features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.modules.head import OBB, Detect, Pose, Segment, WorldDetect, YOLOEDetect, v10Detect

from cache_kd.errors import InputDataError, MismatchError
from cache_kd.structures import DetectorOutput, HeadSpec, Tap
from cache_kd.ultralytics_bridge.layers import find_layers, taps_of

OTHER_TASKS = (Segment, OBB, Pose, WorldDetect, YOLOEDetect, v10Detect)


def detect_head(model: nn.Module, purpose: str) -> Detect:
    """Return the detection head of YOLOv8, 11, 12 or 26, found by its type, never by layer number.

    Raises:
        InputDataError: The model is for another task or has no such head.
    """
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    if not isinstance(head, Detect) or isinstance(head, OTHER_TASKS):
        found = type(head).__name__ if head is not None else type(model).__name__
        task = getattr(model, "task", None)  # of checkpoints; a model that was just built has none
        raise InputDataError(
            f"{purpose} has the head {found}{f' (task {task})' if task else ''}; "
            "allowed: Detect, as in YOLOv8, YOLO11, YOLO12 and YOLO26 detection models"
        )
    return head


def is_fused(model: nn.Module) -> bool:
    """Return whether normalisations were folded into convolutions, as `fuse()` does for inference."""
    return any(isinstance(module, Conv) and not hasattr(module, "bn") for module in model.modules())


def one2many(outputs: Any) -> dict[str, Any]:
    """Return {"boxes", "scores", "feats"} of the one-to-many branch of what a model returned, in either mode."""
    raw = outputs[1] if isinstance(outputs, tuple) else outputs
    branch: dict[str, Any] = raw.get("one2many", raw)
    return branch


def detector_output(outputs: Any) -> DetectorOutput:
    """Return a model's raw outputs, anchors before channels, of the branch whose features carry gradient."""
    raw = one2many(outputs)
    return DetectorOutput(
        features=tuple(raw["feats"]),
        scores=raw["scores"].transpose(1, 2),
        boxes=raw["boxes"].transpose(1, 2),
    )


def score_map(outputs: Any) -> Tensor:
    """Return (B, A): the largest class probability of both branches' mean logits, as in Ultralytics' own loss."""
    raw = outputs[1] if isinstance(outputs, tuple) else outputs
    logits: Tensor = (raw["one2many"]["scores"] + raw["one2one"]["scores"]) / 2 if "one2one" in raw else raw["scores"]
    return logits.float().sigmoid().amax(dim=1)


def describe_head(model: nn.Module, purpose: str, *, layers: Sequence[str] = ()) -> HeadSpec:
    """Return the description of a model's head; channels are taken from a forward pass over a blank image.

    Args:
        layers: names of other layers to describe, see `layers.find_layers`.
    """
    head = detect_head(model, purpose)
    parameter = next(model.parameters())
    size = int(max(head.stride)) * 2
    blank = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        channels = [level.shape[1] for level in one2many(model(blank))["feats"]]
    model.train(was_training)
    given: Any = model.names
    names = given if isinstance(given, dict) else dict(enumerate(given))
    return HeadSpec(
        taps=tuple(
            Tap(f"P{int(stride).bit_length() - 1}", count, int(stride))
            for count, stride in zip(channels, head.stride.tolist(), strict=True)
        ),
        reg_max=int(head.reg_max),
        names=tuple(str(names[index]) for index in range(int(head.nc))),
        end2end=getattr(head, "one2one_cv2", None) is not None,
        hold=(*channels, *(norm.num_features for norm in hold_layers(head))),
        layers=taps_of(model, find_layers(model, layers, purpose), purpose) if layers else (),
    )


def check_levels(teacher: HeadSpec, student: HeadSpec) -> None:
    """Raise `MismatchError` unless both heads have the same feature levels."""
    strides = [[tap.stride for tap in head.taps] for head in (teacher, student)]
    if strides[0] != strides[1]:
        raise MismatchError(
            f"the student's head has strides {strides[1]}, the cache's targets have {strides[0]}; "
            "allowed: a student with the teacher's levels, as any YOLOv8, YOLO11, YOLO12 or YOLO26 detection model"
        )


def hold_layers(head: Detect) -> list[nn.BatchNorm2d]:
    """Return the normalisations whose outputs are the head's hold features after each of its convolutions.

    Order: for each level the box branch's positions 1, 2, …, then the class branch's. Position 0, the head's input, has
    no layer of its own. Empty for a head whose branches are not built of `Conv`.
    """
    found: list[nn.BatchNorm2d] = []
    for box_branch, class_branch in zip(head.cv2, head.cv3, strict=True):
        for branch in (box_branch, class_branch):
            for block in list(branch)[:-1]:
                convs = [module for module in block.modules() if isinstance(module, Conv)]
                if not convs or not isinstance(getattr(convs[-1], "bn", None), nn.BatchNorm2d):
                    return []
                found.append(convs[-1].bn)
    return found


class HoldStatistics:
    """Collects mean and sum of squared deviations of the hold features during a forward pass, in float64."""

    def __init__(self, head: Detect) -> None:
        self._count = len(hold_layers(head))
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        for position, layer in enumerate(hold_layers(head)):
            layer.register_forward_hook(self._keep(position))

    def _keep(self, position: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            # Here and now: the activation that follows works in place.
            self._found[position] = moments(output)

        return hook

    def collect(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return (mean, m2), each (B, hold_channels) float32, CPU: the head's inputs first, then `hold_layers`."""
        found = [moments(level) for level in features] + [self._found.pop(position) for position in range(self._count)]
        mean, m2 = (torch.cat(parts, dim=1).float().cpu() for parts in zip(*found, strict=True))
        return mean, m2


def moments(level: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations over the cells of (B, F, H, W), each (B, F) float64."""
    cells = level.detach().flatten(2)
    if cells.device.type == "cpu":
        # numpy sums float32 into float64 several times faster than torch converts first.
        values = cells.float().contiguous().numpy()
        mean = values.mean(axis=2, dtype=np.float64)
        values = values - mean.astype(np.float32)[..., None]
        np.square(values, out=values)
        return torch.from_numpy(mean), torch.from_numpy(values.sum(axis=2, dtype=np.float64))
    variance, average = torch.var_mean(cells.double(), dim=2, correction=0)
    return average, variance * cells.shape[2]


class PlainDetect(Detect):
    """`Detect` as YOLOv8 builds it: plain convolutions in the class branch."""

    legacy = True


class SeparableDetect(Detect):
    """`Detect` as YOLO11, 12 and 26 build it: separable convolutions in the class branch."""

    legacy = False


def head_recipe(head: Detect) -> dict[str, Any]:
    """Return what `rebuild_head` needs beside the weights, as JSON holds it.

    `legacy` is read off the layers: Ultralytics keeps it on the class, where it tells of the last model built.
    """
    norm = next((module for module in head.modules() if isinstance(module, nn.BatchNorm2d)), None)
    conv = next((module for module in head.modules() if isinstance(module, Conv)), None)
    return {
        "legacy": isinstance(head.cv3[0][0], Conv),
        "norm_eps": norm.eps if norm else None,
        "activation": type(conv.act).__name__ if conv else None,
    }


def rebuild_head(spec: HeadSpec, recipe: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Detect:
    """Return the teacher's frozen head, eval mode, from what the cache holds; neither file nor backbone is needed.

    Raises:
        MismatchError: The weights do not fit a stock head (a teacher with a head of its own).
    """
    known = {name for name, item in vars(nn.modules.activation).items() if isinstance(item, type)}
    if recipe["activation"] not in [None, "Identity", *known]:  # a cache may come from others: no other name is called
        raise MismatchError(f"the stored head is not a stock Detect head: activation {recipe['activation']!r}")
    kind = PlainDetect if recipe["legacy"] else SeparableDetect
    head = kind(nc=spec.num_classes, reg_max=spec.reg_max, end2end=spec.end2end, ch=[tap.channels for tap in spec.taps])
    head.stride = torch.tensor([float(tap.stride) for tap in spec.taps])
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = recipe["norm_eps"]
        elif isinstance(module, Conv) and not isinstance(module.act, nn.Identity):
            module.act = getattr(nn, recipe["activation"])()
    state = {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
    try:
        faults = head.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise MismatchError(
            f"the stored head is not a stock Detect head: {' '.join(str(error).split())[:200]}"
        ) from None
    missing = [name for name in faults.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or faults.unexpected_keys:
        raise MismatchError(f"the stored head is not a stock Detect head: {(missing + faults.unexpected_keys)[:3]}")
    return head.eval().requires_grad_(False)
