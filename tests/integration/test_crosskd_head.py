"""The teacher's head as a cache holds it: it answers to maps as the live one does, and is no part of the student."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached_batches import MIXED, distilled, prepared
from small_inputs import build_model, extraction_threads, save_model, small_data
from student_runs import gradients, results, train_student
from torch import Tensor, nn
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.losses import parse_loss
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.structures import DetectorOutput
from cache_kd.student.distiller import Distiller
from cache_kd.ultralytics_bridge.frozen_head import FrozenDetectHead
from cache_kd.ultralytics_bridge.heads import describe_head, detector_output
from cache_kd.ultralytics_bridge.student import TARGETS
from cache_kd.ultralytics_bridge.teacher import load_teacher
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

IMAGES = 4
TEACHERS = ("yolov8s-bccd", "yolo11n", "yolo26n")
# The depth of a block's last normalisation: YOLO11 and later build their class branch of separable pairs.
HOLD = {"yolov8s-bccd": ("bn", "bn"), "yolo11n": ("bn", "1.bn"), "yolo26n": ("bn", "1.bn")}
BRANCHES = ("box", "cls")


@dataclass(frozen=True)
class Live:
    """A teacher, its exact cache, and what it said of the first images while hooks of this test looked on.

    Attributes:
        holds: (level, branch, position) to the map before the activation, position 0 being the head's input.
    """

    name: str
    model: nn.Module
    cache: Cache
    said: DetectorOutput
    holds: dict[tuple[int, str, int], Tensor]

    def logits(self, level: int, branch: str) -> Tensor:
        """Return the live logits (B, C, H, W) of a level."""
        values = {"box": self.said.boxes, "cls": self.said.scores}[branch]
        cells = [feature.shape[2] * feature.shape[3] for feature in self.said.features]
        part = values.split(cells, dim=1)[level].transpose(1, 2)
        return part.unflatten(2, self.said.features[level].shape[2:])

    def ordered(self) -> tuple[Tensor, ...]:
        """Return all hold features: the inputs, then of each level box 1, box 2, class 1, class 2."""
        return (
            *(self.holds[level, "box", 0] for level in range(3)),
            *(self.holds[level, branch, position] for level in range(3) for branch in BRANCHES for position in (1, 2)),
        )


def watched(name: str, model: nn.Module, images: Tensor) -> tuple[DetectorOutput, dict[tuple[int, str, int], Tensor]]:
    """Run a model and keep its head's hold features."""
    sequence: Any = model.model
    head = sequence[-1]
    holds: dict[tuple[int, str, int], Tensor] = {}

    def keep(key: tuple[int, str, int]) -> Any:
        return lambda _module, _inputs, output: holds.update({key: output.clone()})

    hooks = [
        branches[level][position - 1].get_submodule(HOLD[name][number]).register_forward_hook(
            keep((level, BRANCHES[number], position))
        )
        for number, branches in enumerate((head.cv2, head.cv3))
        for level in range(3)
        for position in (1, 2)
    ]  # fmt: skip
    with torch.no_grad(), extraction_threads():
        said = detector_output(model(images))
    for hook in hooks:
        hook.remove()
    for level, feature in enumerate(said.features):
        holds.update({(level, branch, 0): feature.clone() for branch in BRANCHES})
    return said, holds


@pytest.fixture(scope="module")
def teachers(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Live]:
    folder = tmp_path_factory.mktemp("heads")
    data = small_data(test_data / "data" / "bccd", folder / "set", train=IMAGES)
    found = {}
    for number, name in enumerate(TEACHERS):
        file = test_data / "weights" / f"{name}.pt"
        if not file.exists():
            file = save_model(build_model(f"{name}.yaml", seed=number, imgsz=64), folder / f"{name}.pt")
        options: dict[str, Any] = {"views": 1, "plain_views": 0, "imgsz": 64, "batch": IMAGES, "device": "cpu"}
        path = folder / f"cache-{name}"
        extract(ExtractSettings(file, data, path, fidelity="exact", workers=0, **options))
        cache, model = Cache(path), load_teacher(file).model.eval().to(memory_format=torch.channels_last)
        pixels = np.stack([cache.dataset.sample(MIXED, index).pixels for index in range(IMAGES)])
        images = (torch.from_numpy(pixels).float() / 255).contiguous(memory_format=torch.channels_last)
        found[name] = Live(name, model, cache, *watched(name, model, images))
    return found


@pytest.fixture(params=TEACHERS)
def live(teachers: dict[str, Live], request: pytest.FixtureRequest) -> Live:
    return teachers[request.param]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("branch", BRANCHES)
def test_the_stored_head_goes_on_from_every_position_as_the_live_one(live: Live, branch: str, position: int) -> None:
    head = live.cache.frozen_head()
    for level in range(3):
        hold = live.holds[level, branch, position]
        before = hold.clone()
        answer = head.finish(level, branch, position, hold)
        true = live.logits(level, branch)
        assert answer.shape == true.shape and true.std() > 1e-3
        assert (answer - true).abs().max() <= 1e-5 * true.abs().max()
        assert torch.equal(hold, before), "the map itself is still needed for its gradient"


def test_gradient_flows_through_the_head_to_the_map_alone(live: Live) -> None:
    head = live.cache.frozen_head()
    for position in (0, 1, 2):
        hold = live.holds[0, "cls", position].clone().requires_grad_()
        head.finish(0, "cls", position, hold).square().sum().backward()
        assert hold.grad is not None and hold.grad.abs().sum() > 0
    assert isinstance(head, FrozenDetectHead)
    assert not any(p.requires_grad or p.grad is not None for p in head._head.parameters())


def test_what_the_cache_says_of_the_hold_features(live: Live) -> None:
    head = live.cache.manifest.head
    assert head.hold == tuple(hold.shape[1] for hold in live.ordered())
    assert head.hold_positions == 2
    for (level, branch, position), hold in live.holds.items():
        assert live.ordered()[head.hold_slot(level, branch, position)] is (
            live.holds[level, "box", 0] if position == 0 else hold
        )


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_teacher_that_teaches_itself_has_nothing_to_learn(live: Live, position: int) -> None:
    loss = f"crosskd:position={position}"
    targets = prepared(live.cache, loss)[TARGETS]
    spec = describe_head(live.model, "itself")
    distiller = Distiller([parse_loss(loss)], live.cache.manifest.head, spec, seed=0, head=live.cache.frozen_head())
    assert not list(distiller.parameters()), "equal widths need no adapter"

    def learnt(holds: tuple[Tensor, ...]) -> float:
        return float(distiller(replace(live.said, hold=holds), targets)["crosskd"])

    itself = learnt(live.ordered())
    blurred = learnt(tuple(hold + 0.3 * hold.std() * torch.randn_like(hold) for hold in live.ordered()))
    # Half precision of the stored logits, and rounding where a teacher of random weights is sure of nothing.
    assert 0 <= itself < 0.05 * blurred
    others = learnt(tuple(hold.flip(0) for hold in live.ordered()))
    assert itself < 0.05 * others


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_term_of_an_exact_cache_is_that_of_the_live_teacher(live: Live, position: int) -> None:
    student = "yolov8n.yaml" if live.name == "yolo11n" else "yolo11n.yaml"
    loss = f"crosskd:position={position}"
    model = distilled(build_model(student, seed=9, imgsz=64), live.cache, loss)
    batch = prepared(live.cache, loss)
    cached = term(model, batch)
    kd: Any = model.kd
    head: Any = copy.deepcopy(live.model.model)
    kd.losses["crosskd"].connect(FrozenDetectHead(head[-1]), None)
    holds = [hold.double() for hold in live.ordered()]
    means = torch.cat([hold.mean((2, 3)) for hold in holds], dim=1)
    squares = torch.cat([(hold - hold.mean((2, 3), keepdim=True)).square().sum((2, 3)) for hold in holds], dim=1)
    true = replace(
        batch[TARGETS],
        scores=live.said.scores.half().float(),  # what an exact cache promises: their half precision
        boxes=live.said.boxes.half().float(),
        sent=None,
        hold_mean=means.float(),
        hold_m2=squares.float(),
    )
    at_its_side = term(model, {**batch, TARGETS: true})
    assert at_its_side > 0
    assert cached == pytest.approx(at_its_side, rel=1e-3)
    other = replace(true, hold_mean=true.hold_mean + true.hold_mean.std())
    assert term(model, {**batch, TARGETS: other}) != pytest.approx(cached, rel=1e-2)


def term(model: Any, batch: dict[str, Any]) -> float:
    """Return the one term of a batch, weighted and times its images."""
    return float(model.loss(batch)[0][-1].detach())


def test_the_head_is_neither_trained_nor_saved_with_the_student(full_cache: Path, tmp_path: Path) -> None:
    heads: list[FrozenDetectHead] = []
    before: dict[str, Tensor] = {}

    def look(trainer: DistillTrainer, batch: dict[str, Any]) -> None:
        student = unwrap_model(trainer.model)
        head = student.kd.losses["crosskd"].frozen_head
        assert student.training and not any(module.training for module in head._head.modules())
        if not heads:
            heads.append(head)
            before.update({name: value.clone() for name, value in head._head.state_dict().items()})

    run = train_student(full_cache, tmp_path, "crosskd", student="yolo11n.yaml", before_batch=look, epochs=3)
    (head,) = heads
    student = unwrap_model(run.trainer.model)
    assert student.kd.losses["crosskd"].frozen_head is head
    after = head._head.state_dict()
    assert len(before) > 50 and all(torch.equal(after[name], value) for name, value in before.items())
    foreign = {id(p) for p in head._head.parameters()}
    assert not foreign & {id(p) for p in student.parameters()}
    assert not foreign & {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    assert not any(p.requires_grad or p.grad is not None for p in head._head.parameters())

    stock = set(build_model("yolo11n.yaml").state_dict())
    assert {name for name in student.state_dict() if not name.startswith("kd.")} == stock
    assert set(run.trainer.ema.ema.state_dict()) == stock
    held = torch.load(run.folder / "weights" / "kd_last.pt", weights_only=True)
    tensors = {name for name in held["state"] if not name.endswith("_extra_state")}
    assert tensors == {f"terms.crosskd.adapters.{number}.weight" for number in (1, 3, 5)}, (
        "box branches are of one width"
    )
    saved = torch.load(run.folder / "weights" / "best.pt", weights_only=False)
    assert set(saved["model"].state_dict()) == stock

    values = [float(row["train/crosskd_loss"]) for row in results(run.folder)]
    assert all(value > 0 for value in values) and values[-1] < values[0]
    assert all(0 < float(row["share"]) < 1 for row in gradients(run.folder))
