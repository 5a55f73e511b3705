"""`sl2` from an exact cache is the distillation loss that Ultralytics computes with the teacher at its side."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_inputs import build_model, extraction_threads, save_model, small_data
from torch import Tensor, nn
from ultralytics.nn.distill_model import DistillationModel

from cache_kd.losses import LOSSES, parse_loss
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.structures import View
from cache_kd.student.batch import stack_columns, target_columns
from cache_kd.student.distiller import Distiller
from cache_kd.ultralytics_bridge.heads import describe_head
from cache_kd.ultralytics_bridge.student import TARGETS, attach_distiller

IMAGES, IMGSZ = 6, 128
CHOSEN = (View("mixed", 0), (0, 2, 5)), (View("plain", 0), (1, 2, 3, 4))
PAIRS = {"yolov8": ("yolov8s-bccd", "yolov8n.yaml"), "yolo26": ("yolo26s", "yolo26n.yaml")}


@dataclass(frozen=True)
class Pair:
    """A teacher's file, its exact cache and a student that has not met it."""

    teacher: Path
    cache: Cache
    student: nn.Module

    def batch(self, view: View, indices: tuple[int, ...]) -> dict[str, Any]:
        """Return a training batch with float images, labels and the stored columns, as the trainer prepares it."""
        dataset = self.cache.dataset
        batch: dict[str, Any] = dataset.collate_fn([dataset.item(view, index) for index in indices])
        batch["img"] = batch["img"].float() / 255
        names = self.cache.codec.columns_for(LOSSES["sl2"].needs)
        rows = [self.cache.reader.read(view, index, names) for index in indices]
        columns = target_columns(stack_columns(rows, frozenset()), names)
        return {**batch, TARGETS: self.cache.codec.decode(columns)}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, student = PAIRS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    teacher = test_data / "weights" / f"{name}.pt"
    if not teacher.exists():
        teacher = save_model(build_model(f"{name}.yaml", seed=5), folder / f"{name}.pt", data="bccd.yaml")
    data = small_data(test_data / "data" / "bccd", folder / "set", train=IMAGES)
    options: dict[str, Any] = {"views": 1, "plain_views": 1, "imgsz": IMGSZ, "batch": 4, "fidelity": "exact"}
    extract(ExtractSettings(teacher, data=data, cache=folder / "cache", device="cpu", workers=0, **options))
    return Pair(teacher, Cache(folder / "cache"), build_model(student, seed=6, imgsz=IMGSZ))


def gradients(loss: Tensor, model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the gradient of the parameters below `prefix`, by their names there; zeros where there is none."""
    named = {name.removeprefix(prefix): p for name, p in model.named_parameters() if name.startswith(prefix)}
    named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    pairs = zip(named.items(), found, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys() and ours
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    size = sum(float(theirs[name].double().square().sum()) for name in ours)
    assert size > 0
    return float(np.sqrt(difference / size))


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda chosen: chosen[0].name)
def test_value_and_gradient_are_those_of_ultralytics(pair: Pair, chosen: tuple[View, tuple[int, ...]]) -> None:
    batch = pair.batch(*chosen)
    theirs = DistillationModel(pair.teacher, copy.deepcopy(pair.student)).train()
    student = copy.deepcopy(pair.student).train()
    head = describe_head(student, "student")
    distiller = Distiller([parse_loss("sl2")], pair.cache.manifest.head, head, seed=0)
    distiller.terms["sl2"].projector.load_state_dict(theirs.projector.state_dict())
    ours = attach_distiller(student, distiller)
    with extraction_threads():
        live_loss, live_items = theirs.loss(batch)
        live_gradient = gradients(live_loss[-1], theirs, "student_model.")
        live_projector = gradients(live_loss[-1], theirs, "projector.")
        loss, items = ours.loss(batch)
        gradient = {n: g for n, g in gradients(loss[-1], ours, "").items() if not n.startswith("kd.")}
        projector = gradients(loss[-1], ours, "kd.terms.sl2.projector.")
    assert torch.equal(loss[:-1], live_loss[:-1]), "the students' own losses are one"
    assert float(live_loss[-1].detach()) > 0
    assert float(loss[-1].detach()) == pytest.approx(float(live_loss[-1].detach()), rel=1e-3)
    assert float(items["sl2_loss"]) == pytest.approx(float(live_items["dis_loss"]), rel=1e-3)
    assert relative_difference(gradient, live_gradient) <= 1e-3
    assert relative_difference(projector, live_projector) <= 1e-3


def test_the_comparison_tells_targets_apart(pair: Pair) -> None:
    """Targets of another view, or weights of other cells, would not pass as equal."""
    view, indices = CHOSEN[0]
    batch, other = pair.batch(view, indices), pair.batch(CHOSEN[1][0], indices)
    student = copy.deepcopy(pair.student).train()
    distiller = Distiller([parse_loss("sl2")], pair.cache.manifest.head, describe_head(student, "student"), seed=0)
    ours = attach_distiller(student, distiller)
    right = ours.loss(batch)[0][-1].detach()
    score_map = batch[TARGETS].score_map.flip(0)
    for targets in (other[TARGETS], replace(batch[TARGETS], score_map=score_map)):
        wrong = ours.loss({**batch, TARGETS: targets})[0][-1].detach()
        assert float(wrong) != pytest.approx(float(right), rel=1e-3)
