"""The teacher's outputs are all there in one pass: features, logits, hold statistics, score map, candidates, head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_inputs import BCCD_NAMES, build_model, extraction_threads, save_model, small_data
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.tal import TaskAlignedAssigner

from cache_kd.errors import InputDataError, SettingError
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.structures import TargetBatch, View, ViewSample
from cache_kd.ultralytics_bridge.heads import detect_head, head_recipe, rebuild_head
from cache_kd.ultralytics_bridge.teacher import Checkpoint, Teacher, load_teacher

IMAGES, IMGSZ, BATCH = 6, 128, 3
TEACHERS = ("yolov8s-bccd", "yolo11n-int8deq", "yolo12n", "yolo26n")
STORE = ("features", "logits")


@dataclass(frozen=True)
class Case:
    """A teacher, its exact cache of a few images, and what it says live.

    Attributes:
        raw: the model's own outputs of all views in eval mode, as its forward returns them.
    """

    checkpoint: Checkpoint
    cache: Cache
    views: list[ViewSample]
    raw: Any

    @property
    def model(self) -> nn.Module:
        return self.checkpoint.model

    def decoded(self) -> TargetBatch:
        """Return what the cache holds of all images as one batch."""
        names = tuple(column.name for column in self.cache.codec.columns)
        rows = [self.cache.reader.read(View("mixed", 0), index, names) for index in range(IMAGES)]
        return self.cache.codec.decode(
            {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
        )


def forward(model: nn.Module, images: Tensor) -> Any:
    """Return the outputs of all images, computed in the extraction's own batches and layout.

    Both decide how sums are rounded, which a network of random weights amplifies from layer to layer.
    """
    model.to(memory_format=torch.channels_last)
    batches = images.contiguous(memory_format=torch.channels_last).split(BATCH)
    with torch.inference_mode(), extraction_threads():
        return joined([model(batch) for batch in batches])


def many(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs of the one-to-many branch, the only one that most heads have."""
    branch: dict[str, Any] = raw.get("one2many", raw)
    return branch


def joined(parts: list[Any]) -> Any:
    """Return the outputs of several batches as those of one."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts) if parts[0].ndim > 2 else parts[0]
    if isinstance(parts[0], dict):
        return {key: joined([part[key] for part in parts]) for key in parts[0]}
    return type(parts[0])(joined(list(values)) for values in zip(*parts, strict=True))


def through(head: nn.Module, features: Sequence[Tensor]) -> dict[str, Any]:
    """Return the raw outputs of a head for feature maps."""
    with torch.inference_mode(), extraction_threads():
        said: dict[str, Any] = head([level.clone() for level in features])[1]
    return said


@pytest.fixture(scope="module")
def cases(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    folder = tmp_path_factory.mktemp("teachers")
    bccd = small_data(test_data / "data" / "bccd", folder / "bccd", train=IMAGES)
    coco = small_data(test_data / "data" / "coco128", folder / "coco128", train=IMAGES)
    found: dict[str, Case] = {}
    for number, name in enumerate(TEACHERS):
        file = test_data / "weights" / f"{name}.pt"
        if not file.exists():
            file = save_model(build_model(f"{name}.yaml", seed=number), folder / f"{name}.pt", data="bccd.yaml")
        path = folder / "caches" / name
        options: dict[str, Any] = {"views": 1, "plain_views": 0, "imgsz": IMGSZ, "batch": BATCH, "fidelity": "exact"}
        data = coco if "int8deq" in name else bccd
        extract(ExtractSettings(file, data=data, cache=path, device="cpu", workers=0, **options))
        cache, checkpoint = Cache(path), load_teacher(file)
        views = [cache.dataset.sample(View("mixed", 0), index) for index in range(IMAGES)]
        images = torch.from_numpy(np.stack([view.pixels for view in views])).float() / 255
        found[name] = Case(checkpoint, cache, views, forward(checkpoint.model, images))
    yield found


@pytest.fixture(params=TEACHERS)
def case(cases: dict[str, Case], request: pytest.FixtureRequest) -> Case:
    return cases[request.param]


def stored_head(cache: Cache) -> nn.Module:
    arrays = {name: cache.reader.read_teacher(name) for name in cache.manifest.arrays}
    return rebuild_head(cache.manifest.head, cache.manifest.teacher["head"], arrays)


def close(found: Tensor, expected: Tensor, relative: float) -> bool:
    """Return whether the largest difference is at most `relative` of the largest value."""
    return float((found - expected).abs().max()) <= relative * float(expected.abs().max())


# -- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["last built YOLO11", "last built YOLOv8"])
def test_the_stored_head_gives_the_live_logits(case: Case, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    monkeypatch.setattr(Detect, "legacy", legacy)  # building a model leaves this on the class
    assert head_recipe(detect_head(case.model, "teacher")) == case.cache.manifest.teacher["head"]
    head = stored_head(case.cache)
    live = case.raw[1]
    said = through(head, many(case.raw[1])["feats"])
    branches = ("one2many", "one2one") if "one2one" in live else (None,)
    for branch in branches:
        ours, theirs = (said[branch], live[branch]) if branch else (said, live)
        assert theirs["scores"].std() > 0.01
        assert close(ours["scores"], theirs["scores"], 1e-5)
        assert close(ours["boxes"], theirs["boxes"], 1e-5)


def test_the_stored_head_on_stored_features_gives_the_stored_logits(case: Case) -> None:
    decoded = case.decoded()
    assert decoded.features is not None and decoded.scores is not None
    said = many(through(stored_head(case.cache), decoded.features))
    assert close(said["scores"].transpose(1, 2), decoded.scores, 5e-3)


def test_what_the_cache_says_of_the_head(cases: dict[str, Case]) -> None:
    heads = {name: case.cache.manifest.head for name, case in cases.items()}
    assert [head.reg_max for head in heads.values()] == [16, 16, 16, 1]
    assert [head.end2end for head in heads.values()] == [False, False, False, True]
    assert [head.num_classes for head in heads.values()] == [3, 80, 3, 3]
    for head in heads.values():
        assert [(tap.name, tap.stride) for tap in head.taps] == [("P3", 8), ("P4", 16), ("P5", 32)]
    assert [[tap.channels for tap in head.taps] for head in heads.values()] == [
        [128, 256, 512],
        [64, 128, 256],
        [64, 128, 256],
        [64, 128, 256],
    ]


def test_features_and_logits_are_those_of_the_one_to_many_branch(case: Case) -> None:
    decoded, live = case.decoded(), many(case.raw[1])
    assert decoded.features is not None and decoded.scores is not None and decoded.boxes is not None
    for stored, true in zip(decoded.features, live["feats"], strict=True):
        assert close(stored, true, 2.0**-10)
    assert close(decoded.scores, live["scores"].transpose(1, 2), 2.0**-10)
    boxes = live["boxes"].transpose(1, 2)
    if case.cache.manifest.head.reg_max > 1:
        sides = boxes.reshape(IMAGES, boxes.shape[1], 4, -1)
        boxes = (sides - sides.amax(-1, keepdim=True)).reshape(boxes.shape)
    assert close(decoded.boxes, boxes, 2.0**-10)


# -- hold statistics ------------------------------------------------------------------------------------------------


def last_conv(block: nn.Module) -> nn.Module:
    """Return the last convolution of a block of the head: itself, or the second of a separable pair."""
    return block[-1] if isinstance(block, nn.Sequential) else block


def hold_features(case: Case) -> list[Tensor]:
    """Return the maps (B, F, H, W) whose statistics are stored: the head's inputs, then each level's two branches.

    A branch is walked by hand: convolution and normalisation give the hold feature, the activation is what follows.
    """
    head = detect_head(case.model, "teacher")
    inputs = [level.clone() for level in many(case.raw[1])["feats"]]
    found = list(inputs)
    with torch.inference_mode(), extraction_threads():
        for level, box_branch, class_branch in zip(inputs, head.cv2, head.cv3, strict=True):
            for branch in (box_branch, class_branch):
                x = level
                for block in list(branch)[:-1]:
                    for conv in list(block)[:-1] if isinstance(block, nn.Sequential) else []:
                        x = conv(x)
                    conv = last_conv(block)
                    held = conv.bn(conv.conv(x))  # type: ignore[operator]  # parts of a Conv
                    found.append(held)
                    x = nn.functional.silu(held)
    return found


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4, 5), (4, 2), (3,)], ids=str)
def test_stored_statistics_give_those_of_any_batch(case: Case, chosen: tuple[int, ...]) -> None:
    decoded = case.decoded()
    assert decoded.hold_mean is not None and decoded.hold_m2 is not None
    mean, m2 = decoded.hold_mean[list(chosen)].double(), decoded.hold_m2[list(chosen)].double()
    maps = hold_features(case)
    assert sum(level.shape[1] for level in maps) == mean.shape[1] == case.cache.manifest.head.hold_channels
    start = 0
    for level in maps:
        part = slice(start, start + level.shape[1])
        start = part.stop
        cells = level.shape[2] * level.shape[3]
        batch_mean = mean[:, part].mean(0)
        total = m2[:, part].sum(0) + cells * (mean[:, part] - batch_mean).square().sum(0)
        variance = total / (cells * len(chosen) - 1)
        values = level[list(chosen)].double().transpose(0, 1).flatten(1)
        spread = values.std(1)
        assert ((batch_mean - values.mean(1)).abs() <= 1e-5 * (spread + values.mean(1).abs()) + 1e-9).all()
        torch.testing.assert_close(variance, values.var(1, correction=1), rtol=1e-4, atol=1e-10)


# -- score map ------------------------------------------------------------------------------------------------------


def test_the_score_map_is_the_best_class_of_the_mean_of_all_heads(case: Case) -> None:
    raw = case.raw[1]
    logits = (raw["one2many"]["scores"] + raw["one2one"]["scores"]) / 2 if "one2one" in raw else raw["scores"]
    stored = case.decoded().score_map
    assert stored is not None
    torch.testing.assert_close(stored, logits.sigmoid().amax(1), rtol=2.0**-10, atol=1e-5)


def test_both_heads_of_yolo26_count(cases: dict[str, Case]) -> None:
    raw, stored = cases["yolo26n"].raw[1], cases["yolo26n"].decoded().score_map
    assert stored is not None
    for branch in ("one2many", "one2one"):
        alone = raw[branch]["scores"].sigmoid().amax(1)
        assert not torch.allclose(stored, alone, rtol=1e-2)


# -- candidates -----------------------------------------------------------------------------------------------------


def test_in_box_is_the_union_of_the_assigners_candidates(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates are taken from Ultralytics' own detection loss while it runs on the very same views."""
    seen: list[Tensor] = []
    original = TaskAlignedAssigner.select_candidates_in_gts

    def spy(self: TaskAlignedAssigner, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = original(self, *args, **kwargs)
        seen.append(found)
        return found

    items = [case.cache.dataset.item(View("mixed", 0), index) for index in range(IMAGES)]
    batch = case.cache.dataset.collate_fn(items)
    model = case.model
    model.args = build_model("yolov8n.yaml").args
    criterion = v8DetectionLoss(model)
    with monkeypatch.context() as patch:
        patch.setattr(TaskAlignedAssigner, "select_candidates_in_gts", spy)
        criterion(
            {key: value.clone() for key, value in many(case.raw[1]).items() if key != "feats"}
            | {"feats": [level.clone() for level in many(case.raw[1])["feats"]]},
            batch,
        )
    (candidates,) = seen  # (B, boxes, A), padded with empty boxes
    teacher = Teacher(case.checkpoint, imgsz=IMGSZ, device="cpu", precision="fp32", store=STORE)
    for row, view in enumerate(case.views):
        expected = candidates[row, : len(view.boxes)].bool().any(0).numpy()
        found = teacher.anchors.in_box(view.boxes)
        assert np.array_equal(found, expected)
        assert len(view.boxes) == 0 or 0 < found.sum() < len(found)
    assert any(len(view.boxes) for view in case.views)


def test_no_box_has_no_candidates(case: Case) -> None:
    teacher = Teacher(case.checkpoint, imgsz=IMGSZ, device="cpu", precision="fp32", store=STORE)
    assert not teacher.anchors.in_box(np.zeros((0, 4), dtype=np.float32)).any()


# -- how it runs ----------------------------------------------------------------------------------------------------


def test_the_teacher_is_frozen_unfused_and_in_eval_mode(case: Case) -> None:
    teacher = Teacher(case.checkpoint, imgsz=IMGSZ, device="cpu", precision="fp32", store=STORE)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in teacher.model.modules())
    state = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    teacher(case.views, batch=BATCH)
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_short_batch_and_its_neighbours_change_nothing(case: Case) -> None:
    teacher = Teacher(case.checkpoint, imgsz=IMGSZ, device="cpu", precision="fp32", store=STORE)
    with extraction_threads():
        together = teacher(case.views[:3], batch=3)
        alone = teacher(case.views[1:2], batch=3)
    for one, other in zip(together[1].features, alone[0].features, strict=True):
        assert np.array_equal(one, other)
    for name in ("scores", "boxes", "score_map", "hold_mean", "hold_m2", "in_box"):
        assert np.array_equal(getattr(together[1], name), getattr(alone[0], name)), name


def test_only_what_is_stored_is_returned(cases: dict[str, Case]) -> None:
    case = cases["yolo12n"]
    for store, present in ((("features",), {"features", "score_map"}), (("logits",), {"scores", "boxes", "in_box"})):
        teacher = Teacher(case.checkpoint, imgsz=IMGSZ, device="cpu", precision="fp32", store=store)
        (said,) = teacher(case.views[:1], batch=1)
        for name in ("features", "score_map", "scores", "boxes", "in_box"):
            value = getattr(said, name)
            assert (value is not None and len(value) > 0) == (name in present), (store, name)


def test_half_precision_is_close_to_single(test_data: Path, cases: dict[str, Case]) -> None:
    case = cases["yolov8s-bccd"]
    checkpoint = load_teacher(test_data / "weights" / "yolov8s-bccd.pt")
    teacher = Teacher(checkpoint, imgsz=IMGSZ, device="cpu", precision="fp16", store=STORE)
    assert next(teacher.model.parameters()).dtype is torch.float16
    (said,) = teacher(case.views[:1], batch=1)
    live = many(case.raw[1])
    for half, single in zip(said.features, live["feats"], strict=True):
        assert half.dtype == np.float32
        relative = np.linalg.norm(half - single[0].numpy()) / np.linalg.norm(single[0].numpy())
        assert 1e-6 < relative < 5e-3


def test_other_precisions_are_refused(cases: dict[str, Case]) -> None:
    with pytest.raises(SettingError, match="--precision 'bf16'; allowed: fp32, fp16"):
        Teacher(cases["yolo12n"].checkpoint, imgsz=IMGSZ, device="cpu", precision="bf16", store=STORE)


def test_a_teacher_of_another_task_is_refused_in_one_line(tmp_path: Path) -> None:
    file = save_model(build_model("yolov8n-seg.yaml"), tmp_path / "seg.pt", data="bccd.yaml", task="segment")
    with pytest.raises(
        InputDataError, match=r"seg\.pt has the head Segment \(task segment\); allowed: Detect"
    ) as caught:
        load_teacher(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_a_fused_teacher_is_refused(tmp_path: Path, name: str) -> None:
    model = build_model(name, BCCD_NAMES).eval().fuse(verbose=False)  # type: ignore[operator]  # of a BaseModel
    file = save_model(model, tmp_path / "fused.pt", data="bccd.yaml")
    with pytest.raises(InputDataError, match="is fused; use the checkpoint that training wrote"):
        load_teacher(file)
