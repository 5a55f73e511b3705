"""What losses are told of labels and of the student's own assignment is what Ultralytics works with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached_batches import distilled, prepared
from small_inputs import build_model
from torch import Tensor
from ultralytics.utils.tal import TaskAlignedAssigner, dist2bbox, make_anchors

from cache_kd.pipeline.opened import Cache
from cache_kd.structures import Assignment, DetectorOutput, Labels, TargetBatch, View
from cache_kd.ultralytics_bridge.student import batch_labels

LOSS = "ld:region=assigned"
LOSSES = {"yolov8n": LOSS, "yolo11n": LOSS, "yolo26n": "nkd"}
STRIDES = (8, 16, 32)
# The settings of YOLO's own loss for its one-to-many branch.
TOP, ALPHA, BETA = 10, 0.5, 6.0


def observed(model: Any, batch: dict[str, Any]) -> tuple[DetectorOutput, TargetBatch]:
    """Return what the distiller is told during a training step."""
    seen: list[tuple[DetectorOutput, TargetBatch]] = []
    hook = model.kd.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model.loss(batch)
    hook.remove()
    ((said, targets),) = seen
    return said, targets


def padded(labels: Labels, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return classes (B, n, 1), boxes (B, n, 4) and mask (B, n, 1) as the assigner takes them."""
    most = max(int((labels.image == image).sum()) for image in range(images))
    cls, boxes, mask = torch.zeros(images, most, 1), torch.zeros(images, most, 4), torch.zeros(images, most, 1)
    for image in range(images):
        own = labels.image == image
        count = int(own.sum())
        cls[image, :count, 0], boxes[image, :count], mask[image, :count] = labels.cls[own].float(), labels.boxes[own], 1
    return cls, boxes, mask


def assigned_anew(said: DetectorOutput, labels: Labels, reg_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (class, best target score, positive), each (B, A), of an assigner of this test's own."""
    points, strides = make_anchors([feature.detach() for feature in said.features], torch.tensor(STRIDES).float())
    sides = said.boxes.detach()
    if reg_max > 1:
        bins = torch.arange(reg_max, dtype=torch.float32)
        sides = sides.unflatten(2, (4, reg_max)).softmax(3) @ bins
    boxes = dist2bbox(sides, points, xywh=False) * strides
    cls, truth, mask = padded(labels, len(sides))
    assigner = TaskAlignedAssigner(topk=TOP, num_classes=3, alpha=ALPHA, beta=BETA, stride=list(STRIDES))
    found, _, scores, positive, _ = assigner(said.scores.detach().sigmoid(), boxes, points * strides, cls, truth, mask)
    return found, scores.amax(-1), positive


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (7, 5)], ids=str)
def test_the_assignment_is_what_an_assigner_says_of_the_same_outputs(
    few_cache: Path, name: str, indices: tuple[int, ...]
) -> None:
    cache = Cache(few_cache)
    model = distilled(build_model(f"{name}.yaml", seed=3, imgsz=64), cache, LOSSES[name])
    said, targets = observed(model, prepared(cache, LOSSES[name], indices=indices))
    assert isinstance(said.assigned, Assignment) and targets.labels is not None
    cls, quality, positive = assigned_anew(said, targets.labels, 1 if name == "yolo26n" else 16)
    ours = said.assigned
    assert 0 < ours.positive.sum() < ours.positive.numel()
    assert torch.equal(ours.positive, positive)
    assert torch.equal(ours.cls[positive], cls[positive].long()) and not ours.cls[~positive].any()
    torch.testing.assert_close(ours.quality[positive], quality[positive], rtol=1e-4, atol=1e-7)
    assert not ours.quality[~positive].any() and 0 < ours.quality.max() <= 1
    assert len(set(ours.cls[positive].tolist())) > 1
    assert not ours.quality.requires_grad


def test_yolo26_tells_of_its_one_to_many_branch(few_cache: Path) -> None:
    """The one-to-one branch takes one anchor an object; the losses' outputs are the other branch's."""
    cache = Cache(few_cache)
    model: Any = distilled(build_model("yolo26n.yaml", seed=3, imgsz=64), cache, "nkd")
    batch = prepared(cache, "nkd")
    said, targets = observed(model, batch)
    assert said.assigned is not None and targets.labels is not None
    found = []
    for part in ("one2many", "one2one"):
        assigner = getattr(model.criterion, part).assigner
        assigner.register_forward_hook(lambda module, inputs, output: found.append(output[3].sum()))
    model.loss(batch)
    many, one = found
    assert said.assigned.positive.sum() == many > one > 0


def test_other_losses_are_told_of_no_assignment(few_cache: Path) -> None:
    cache = Cache(few_cache)
    said, targets = observed(distilled(build_model("yolov8n.yaml", imgsz=64), cache, "ld"), prepared(cache, "ld"))
    assert said.assigned is None and said.hold == () and said.layers == {}
    assert targets.labels is not None


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [View("mixed", 0), View("plain", 0)], ids=lambda view: view.name)
def test_labels_are_the_views_own_in_pixels(few_cache: Path, view: View) -> None:
    cache = Cache(few_cache)
    indices = (4, 0, 9)
    labels = batch_labels(prepared(cache, "cwd", view=view, indices=indices))
    for image, index in enumerate(indices):
        sample = cache.dataset.sample(view, index)
        own = labels.image == image
        assert len(sample.boxes) > 0
        np.testing.assert_allclose(labels.boxes[own], sample.boxes, rtol=0, atol=1e-4)
        assert labels.cls[own].tolist() == sample.cls.tolist()
    assert labels.image.dtype == labels.cls.dtype == torch.int64 and labels.boxes.dtype == torch.float32
    assert (labels.image.diff() >= 0).all()


def without_labels(batch: dict[str, Any], keep: int | None) -> dict[str, Any]:
    """Return a batch whose images have no labels but `keep`."""
    mask = batch["batch_idx"] == (-1 if keep is None else keep)
    return {**batch, **{name: batch[name][mask] for name in ("batch_idx", "cls", "bboxes")}}


@pytest.mark.parametrize("keep", [None, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_images_without_labels_have_no_positives(few_cache: Path, name: str, keep: int | None) -> None:
    cache = Cache(few_cache)
    losses = (LOSSES[name], "fgd", "ifvd", "wsld")
    model: Any = distilled(build_model(f"{name}.yaml", seed=3, imgsz=64), cache, *losses)
    batch = without_labels(prepared(cache, *losses), keep)
    said, targets = observed(model, batch)
    assert said.assigned is not None and targets.labels is not None
    assert sorted(set(targets.labels.image.tolist())) == ([] if keep is None else [keep])
    assert [bool(row.any()) for row in said.assigned.positive] == [image == keep for image in range(4)]
    anchors = sum((64 // stride) ** 2 for stride in STRIDES)
    for values in (said.assigned.positive, said.assigned.cls, said.assigned.quality):
        assert values.shape == (4, anchors)
    total, _ = model.loss(batch)
    assert total.isfinite().all()
