"""In: a checkpoint. Out: a frozen teacher that says all targets of a batch of views in one forward pass."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import load_checkpoint

from cache_kd.errors import InputDataError, MissingFileError, SettingError
from cache_kd.fingerprint import digest_file, digest_tensors
from cache_kd.structures import SampleTargets, ViewSample
from cache_kd.ultralytics_bridge.gate import announce_trusted, readable, safe_loading
from cache_kd.ultralytics_bridge.heads import (
    HoldStatistics,
    describe_head,
    detect_head,
    detector_output,
    head_recipe,
    is_fused,
    score_map,
)
from cache_kd.ultralytics_bridge.kept_anchors import KeptAnchors
from cache_kd.ultralytics_bridge.layers import captured, find_layers
from cache_kd.ultralytics_bridge.structure import digest_structure

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A teacher's file as read: the model, what its training recorded, and its identities."""

    path: Path
    model: nn.Module
    train_args: dict[str, Any]
    file_sha256: str
    weights_sha256: str
    structure_sha256: str


def load_teacher(path: Path, *, trusted: bool = False, role: str = "teacher") -> Checkpoint:
    """Return the checkpoint's model (EMA weights where it has them), fp32, eval mode, never fused.

    Args:
        path: An Ultralytics detection checkpoint.
        trusted: Allow the file to run code while it loads, as Ultralytics does by default.
        role: What the checkpoint is to the command, for messages: "teacher", or "student" to look at one.

    Raises:
        MissingFileError: No such file (it is never downloaded).
        InputDataError: Not a checkpoint, one that needs `--trust-teacher`, or a model of another task.
    """
    if not path.is_file():
        raise MissingFileError(f"{role} {path}: no such file; name an existing checkpoint: --{role} best.pt")
    if path.suffix != ".pt":
        raise InputDataError(f"{role} {path} is not a checkpoint; allowed: a file ending in .pt, as best.pt")
    sha256 = digest_file(path)
    if trusted:
        announce_trusted(role, path)
    with safe_loading(trusted=trusted), readable(role, path, f"--trust-{role}"):
        model, content = load_checkpoint(str(path), device="cpu")
    if detect_head(model, f"{role} {path}").cv2 is None or is_fused(model):
        raise InputDataError(f"{role} {path} is fused; use the checkpoint that training wrote, as weights/best.pt")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise InputDataError(
                f"{role} {path}: {count} of {tensor.numel()} values of {name} are not finite; use another checkpoint, "
                "such as the best.pt of its training"
            )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights, structure = digest_tensors(model.state_dict()), digest_structure(model)
    return Checkpoint(path, model, dict(content.get("train_args") or {}), sha256, weights, structure)


class Teacher:
    """Runs the teacher over a batch of views and returns one `SampleTargets` a view.

    Args:
        checkpoint: From `load_teacher`.
        imgsz: Side of the square views in pixels.
        device: torch device name.
        precision: "fp32" or "fp16" (bf16 errs by .3 % of a feature and is not offered).
        store: which targets to compute, of `structures.STORES`.
        taps: names of layers whose maps are targets too, see `layers.find_layers`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        imgsz: int,
        device: str,
        precision: str,
        store: tuple[str, ...],
        taps: tuple[str, ...] = (),
    ) -> None:
        if precision not in PRECISIONS:
            raise SettingError(f"--precision {precision!r}; allowed: {', '.join(PRECISIONS)}")
        self.imgsz, self.store = imgsz, store
        purpose = f"teacher {checkpoint.path}"
        self.head = describe_head(checkpoint.model, purpose, layers=taps)
        self.device, self.dtype = torch.device(device), PRECISIONS[precision]
        # channels_last took a fifth off a forward pass on the CPU; convolutions round by it, like by the batch size.
        self.model = checkpoint.model.to(self.device, self.dtype).to(memory_format=torch.channels_last).eval()
        self._statistics = HoldStatistics(detect_head(self.model, "teacher"))
        self.anchors = KeptAnchors(self.head, imgsz, store)
        self._layers = find_layers(self.model, taps, purpose)
        self.forward_seconds = 0.0

    def __call__(self, views: list[ViewSample], *, batch: int) -> list[SampleTargets]:
        """Return targets in the order of `views`; a short batch is padded to `batch` images by repeating its last.

        A forward pass over fewer images may round differently, so every pass has the same size.
        """
        pixels = np.stack([view.pixels for view in views] + [views[-1].pixels] * (batch - len(views)))
        images = torch.from_numpy(pixels).to(self.device).to(self.dtype) / 255
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            with captured(self._layers) as layers:
                outputs = self._timed_forward(images)
            said = detector_output(outputs)
            mean, m2 = self._statistics.collect(said.features)
            best = score_map(outputs)
        features = [_to_numpy(level) for level in said.features] if "features" in self.store else []
        maps = [_to_numpy(layers[name]) for name in self._layers]
        keep_logits = "logits" in self.store
        scores, boxes = (_to_numpy(said.scores), _to_numpy(said.boxes)) if keep_logits else (None, None)
        score_maps = _to_numpy(best)
        return [
            SampleTargets(
                features=tuple(level[row] for level in features),
                scores=scores[row] if scores is not None else None,
                boxes=boxes[row] if boxes is not None else None,
                score_map=score_maps[row] if features else None,
                hold_mean=mean[row].numpy() if keep_logits else None,
                hold_m2=m2[row].numpy() if keep_logits else None,
                in_box=self.anchors.kept(view.boxes) if keep_logits else None,
                layers=tuple(level[row] for level in maps),
            )
            for row, view in enumerate(views)
        ]

    def _timed_forward(self, images: Tensor) -> Any:
        """Return the model's outputs; what a live teacher would cost in a training is counted."""
        started = time.perf_counter()
        outputs = self.model(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies that follow would wait for it anyway
        self.forward_seconds += time.perf_counter() - started
        return outputs

    def head_arrays(self) -> dict[str, np.ndarray]:
        """Return the head's weights in float32, by name: what a student needs to run features through this head."""
        head = detect_head(self.model, "teacher")
        return {
            name: tensor.float().cpu().numpy()
            for name, tensor in head.state_dict().items()
            if tensor.is_floating_point()
        }

    def head_recipe(self) -> dict[str, Any]:
        """Return what `heads.rebuild_head` needs beside `head_arrays`."""
        return head_recipe(detect_head(self.model, "teacher"))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().contiguous().numpy()
