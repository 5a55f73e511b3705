"""Every method in `LOSSES` keeps the same promises; a new one is tested by being registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache_kd.errors import MismatchError
from cache_kd.losses import LOSSES, DistillLoss
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

Cases = Callable[..., Any]
Heads = Callable[..., HeadSpec]


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(name: str, case: Any) -> DistillLoss:
    torch.manual_seed(0)
    return LOSSES[name](case.teacher, case.student)


def gradients(loss: Tensor, case: Any) -> list[Tensor]:
    """Gradients on the student's tensors; a zero for one that the method does not read."""
    found = torch.autograd.grad(loss, case.student_tensors, allow_unused=True)
    return [torch.zeros(()) if grad is None else grad for grad in found]


def target_tensors(targets: TargetBatch) -> list[Tensor]:
    return [t for t in (*(targets.features or ()), targets.scores, targets.boxes, targets.score_map) if t is not None]


def repeated(values: Any) -> Any:
    """The same outputs or targets with the batch twice in a row."""

    def twice(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(twice(item) for item in value)
        return value if value is None else torch.cat((value, value))

    return type(values)(**{field.name: twice(getattr(values, field.name)) for field in fields(values)})


def make_identity(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def test_description_is_complete(name: str) -> None:
    method = LOSSES[name]
    assert method.name == name
    assert method.__module__ == f"cache_kd.losses.{name}"
    assert method.needs and method.needs <= {"features", "score_map", "logits"}
    assert method.default_weight > 0
    for text in (method.title, method.paper, method.cost, method.protocol):
        assert text and "\n" not in text


def test_every_option_is_annotated_and_its_default_allowed(name: str) -> None:
    method = LOSSES[name]
    parameters = list(inspect.signature(method.__init__, eval_str=True).parameters.values())[3:]
    assert all(p.kind is p.KEYWORD_ONLY and p.annotation in (float, int, bool, str) for p in parameters)
    assert all(type(p.default) is p.annotation for p in parameters)
    assert set(method.allowed) <= {p.name for p in parameters}
    method.check_options({p.name: p.default for p in parameters})


def test_zero_when_student_equals_teacher_and_positive_otherwise(name: str, make_case: Cases) -> None:
    case = make_case()
    loss = LOSSES[name](case.teacher, case.teacher)
    make_identity(loss)
    # Projectors with a ReLU can only be the identity on values that are not negative.
    features = tuple(f.detach().abs() for f in case.targets.features)
    targets = replace(case.targets, features=features)
    same = DetectorOutput(features, targets.scores.detach(), targets.boxes.detach())
    assert loss(same, targets).item() == pytest.approx(0, abs=1e-6)
    other = DetectorOutput(tuple(f.flip(1) for f in features), same.scores.flip(2), same.boxes.flip(2))
    assert loss(other, targets).item() > 1e-3


def test_teacher_gets_no_gradient_and_student_does(name: str, make_case: Cases) -> None:
    case = make_case()
    tensors = target_tensors(case.targets)
    assert all(t.requires_grad for t in tensors)
    build(name, case)(case.output, case.targets).backward()
    assert all(t.grad is None for t in tensors)
    assert any(t.grad is not None and t.grad.abs().sum() > 1e-4 for t in case.student_tensors)


def test_every_adapter_parameter_moves(name: str, make_case: Cases) -> None:
    case = make_case()
    loss = build(name, case)
    before = {key: value.detach().clone() for key, value in loss.named_parameters()}
    loss(case.output, case.targets).backward()
    # Plain descent: Adam would turn rounding noise into full steps and hide a parameter without a gradient.
    with torch.no_grad():
        for value in loss.parameters():
            value -= 0.0 if value.grad is None else value.grad
    still = [key for key, value in loss.named_parameters() if (value - before[key]).abs().max() < 1e-5]
    assert still == []


def test_adapters_exist_where_channels_differ(name: str, make_case: Cases) -> None:
    case = make_case()
    loss = build(name, case)
    if "features" not in loss.needs:
        assert list(loss.parameters()) == []
        return
    (levels,) = loss.children()
    for level, ours, theirs in zip(levels.children(), case.student.taps, case.teacher.taps, strict=True):
        shape = level(torch.zeros(1, ours.channels, 3, 5)).shape
        assert shape == (1, theirs.channels, 3, 5)


@pytest.mark.parametrize("size", [1e3, 6e4])
def test_extreme_logits_stay_finite(name: str, size: float, make_case: Cases) -> None:
    case = make_case()
    flat = [t.detach() for t in target_tensors(case.targets)]
    signs = [(t.sign() * size) for t in flat]
    maps, (scores, boxes) = tuple(signs[:3]), signs[3:5]
    targets = replace(case.targets, features=maps, scores=scores, boxes=boxes - boxes.amax())
    with torch.no_grad():
        for tensor in case.student_tensors:
            tensor.copy_(tensor.sign() * size)
    loss = build(name, case)(case.output, targets)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, case))


def test_one_class(name: str, make_case: Cases) -> None:
    case = make_case(classes=1)
    loss = build(name, case)(case.output, case.targets)
    assert loss.isfinite() and loss > 1e-4
    assert sum(grad.abs().sum() for grad in gradients(loss, case)) > 1e-4


def test_nothing_sent_and_nothing_seen(name: str, make_case: Cases) -> None:
    case = make_case()
    targets = replace(
        case.targets,
        scores=torch.full_like(case.targets.scores, -15),
        score_map=torch.zeros_like(case.targets.score_map),
        sent=torch.zeros_like(case.targets.sent),
    )
    loss = build(name, case)(case.output, targets)
    assert loss.isfinite() and loss.requires_grad
    loss.backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in case.student_tensors)


def test_boxes_of_anchors_not_sent_teach_nothing(name: str, make_case: Cases) -> None:
    case = make_case()
    loss = build(name, case)
    *_, boxes = gradients(loss(case.output, case.targets), case)
    if boxes.dim() == 0:
        return
    unsent, unsure = ~case.targets.sent, case.targets.score_map.detach() <= 0.05
    assert boxes[unsent].abs().sum() == 0
    assert boxes[~unsent].abs().sum() > 1e-5
    dense = replace(case.targets, sent=None, scores=case.targets.scores.detach() - 3)
    *_, boxes = gradients(loss(case.output, dense), case)
    unsure = dense.scores.sigmoid().amax(-1) <= 0.05
    assert 0 < unsure.sum() < unsure.numel()
    assert boxes[unsure].abs().sum() == 0
    assert (boxes[~unsure].abs().sum(-1) > 0).all()


def test_repeating_the_batch_changes_nothing(name: str, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    loss = build(name, case).double()
    once = loss(case.output, case.targets)
    assert loss(repeated(case.output), repeated(case.targets)).item() == pytest.approx(once.item(), rel=1e-7)


def test_float64_is_kept(name: str, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    assert build(name, case).double()(case.output, case.targets).dtype == torch.float64


def test_half_outputs_and_autocast_are_computed_in_float32(name: str, make_case: Cases) -> None:
    case = make_case()
    loss = build(name, case)
    half = DetectorOutput(
        tuple(f.detach().half() for f in case.output.features),
        case.output.scores.detach().half(),
        case.output.boxes.detach().half(),
    )
    full = DetectorOutput(tuple(f.float() for f in half.features), half.scores.float(), half.boxes.float())
    expected = loss(full, case.targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(half, case.targets)
    assert found.dtype == torch.float32
    assert found.item() == expected.item()


def test_heads_without_bins(name: str, make_case: Cases) -> None:
    case = make_case(reg_max=1)
    if name == "ld":
        with pytest.raises(MismatchError, match=r"reg_max is 1, the student's 1; allowed: equal and at least 2; use"):
            build(name, case)
        return
    assert build(name, case)(case.output, case.targets).isfinite()


@pytest.mark.parametrize("channels", [(8, 16), (8, 16, 6, 6)])
def test_another_number_of_levels_is_refused(
    name: str, channels: tuple[int, ...], make_case: Cases, head: Heads
) -> None:
    with pytest.raises(MismatchError, match=r"strides of the student's levels are 8, 16.*the teacher's 8, 16, 32"):
        LOSSES[name](make_case().teacher, head(*channels))


def test_other_strides_are_refused(name: str, make_case: Cases) -> None:
    case = make_case()
    taps = tuple(replace(tap, stride=tap.stride * 2) for tap in case.student.taps)
    with pytest.raises(MismatchError, match="levels are 16, 32, 64, the teacher's 8, 16, 32"):
        LOSSES[name](case.teacher, replace(case.student, taps=taps))


def test_targets_not_read_are_asked_for(name: str, make_case: Cases) -> None:
    case = make_case()
    with pytest.raises(MismatchError, match=rf"loss {name} needs .*--store features,logits"):
        build(name, case)(case.output, TargetBatch())


def test_cwd_leaves_maps_of_equal_channels_alone(make_case: Cases) -> None:
    kinds = [type(adapter) for adapter in build("cwd", make_case()).adapters]
    assert kinds == [nn.Conv2d, nn.Identity, nn.Conv2d]


@pytest.mark.parametrize("reg_max", [(16, 8), (1, 16), (16, 1)])
def test_ld_refuses_unequal_bins(reg_max: tuple[int, int], head: Heads) -> None:
    with pytest.raises(MismatchError, match=r"loss ld.*allowed: equal and at least 2"):
        LOSSES["ld"](head(8, reg_max=reg_max[0]), head(8, reg_max=reg_max[1]))


@pytest.mark.parametrize("reg_max", [(1, 16), (16, 1), (8, 16)])
def test_bckd_decodes_each_side_with_its_own_bins(reg_max: tuple[int, int], make_case: Cases) -> None:
    ours, theirs = make_case(reg_max=reg_max[0]), make_case(reg_max=reg_max[1])
    targets = replace(ours.targets, boxes=theirs.targets.boxes)
    loss = LOSSES["bckd"](theirs.teacher, ours.student)(ours.output, targets)
    cls_only = LOSSES["bckd"](theirs.teacher, ours.student, box_weight=0.0)(ours.output, targets)
    assert loss.isfinite() and loss > cls_only
