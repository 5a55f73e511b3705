"""Every method in `LOSSES` keeps the same promises; a new one is tested by being registered."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import BATCH, draw_outputs, hold_statistics, make_labels
from torch import Tensor, nn

from cache_kd.errors import CacheKDError, MismatchError, SettingError
from cache_kd.losses import LOSSES, DistillLoss, LossSpec, build_loss, parse_loss
from cache_kd.losses.crosskd import CrossKD
from cache_kd.losses.maps import MapLoss
from cache_kd.losses.spec import option_defaults
from cache_kd.structures import Assignment, DetectorOutput, HeadSpec, Labels, TargetBatch

Cases = Callable[..., Any]
Heads = Callable[..., HeadSpec]

NEEDS = {"features", "score_map", "logits", "hold_stats", "vlr"}
READS = {"labels", "assignment", "hold", "head"}
MAP_METHODS = [name for name, method in LOSSES.items() if issubclass(method, MapLoss)]
# These compare what does not depend on the number of channels.
WITHOUT_ADAPTERS = {"at", "local", "pa", "ifvd"}


def variants(name: str) -> list[str]:
    """Return the method with its defaults, then with each other word and truth value that an option may take."""
    method, found = LOSSES[name], [name]
    for key, default in option_defaults(method).items():
        words = method.allowed[key].text.split(", ") if isinstance(default, str) else []
        truths = [str(not default).lower()] if isinstance(default, bool) else []
        found += [f"{name}:{key}={value}" for value in (*words, *truths) if value != default]
    return found


# What these options change, as docstrings say: the literal −p·log q draws the row's own class to 1; and a factor that
# follows the student is detached, so that student = teacher has no gradient, yet not the smallest value.
AT_IDENTITY = {("nkd", "softmax"): "other", ("wsld", "softmax"): "at rest"}
# Numbers that make a method another one.
NUMBERS = ("ld:vlr=1", "crosskd:position=0", "crosskd:position=2")
TEXTS = [*(text for name in LOSSES for text in variants(name)), *NUMBERS]


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=TEXTS)
def spec(request: pytest.FixtureRequest) -> LossSpec:
    return parse_loss(request.param)


def build(spec: LossSpec | str, case: Any, student: HeadSpec | None = None) -> DistillLoss:
    torch.manual_seed(0)
    spec = parse_loss(spec) if isinstance(spec, str) else spec
    loss = build_loss(spec, case.teacher, student or case.student)
    loss.connect(case.head, None)
    return loss


def gradients(loss: Tensor, case: Any) -> list[Tensor]:
    """Gradients on the student's tensors; a zero for one that the method does not read."""
    found = torch.autograd.grad(loss, case.student_tensors, allow_unused=True)
    return [torch.zeros(()) if grad is None else grad for grad in found]


def target_tensors(targets: TargetBatch) -> list[Tensor]:
    single = (targets.scores, targets.boxes, targets.score_map, targets.hold_mean, targets.hold_m2)
    return [*targets.features, *targets.layers.values(), *single, targets.labels.boxes]


def mapped(values: DetectorOutput, change: Callable[[Tensor], Tensor]) -> DetectorOutput:
    """The same outputs with `change` applied to every tensor that a network computed."""
    return replace(
        values,
        features=tuple(map(change, values.features)),
        scores=change(values.scores),
        boxes=change(values.boxes),
        layers={name: change(layer) for name, layer in values.layers.items()},
        hold=tuple(map(change, values.hold)),
    )


def repeated(values: Any, times: int) -> Any:
    """The same outputs or targets with the batch several times in a row."""

    def many(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value] * times)
        if isinstance(value, tuple):
            return tuple(map(many, value))
        if isinstance(value, dict):
            return {key: many(item) for key, item in value.items()}
        if isinstance(value, Labels):
            images = torch.cat([value.image + BATCH * i for i in range(times)])
            return Labels(images, many(value.cls), many(value.boxes))
        if value is None:
            return None
        return type(value)(**{key: many(item) for key, item in vars(value).items()})

    return many(values)


def identity_case(spec: LossSpec, case: Any) -> tuple[DistillLoss, DetectorOutput, TargetBatch]:
    """A student with the teacher's head whose outputs are the teacher's, adapters being the identity."""
    loss = build(spec, case, student=case.teacher).double()
    apart = {id(value) for value in loss.parameters_trained_apart()}
    for layer in loss.modules():
        if isinstance(layer, nn.Conv2d) and isinstance(layer.weight, nn.Parameter) and id(layer.weight) not in apart:
            nn.init.dirac_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    # Projectors with a ReLU can only be the identity on values that are not negative.
    features = tuple(f.detach().abs() for f in case.targets.features)
    layers = {key: value.detach().abs() for key, value in case.targets.layers.items()}
    hold = (*features, *(h.detach() for h in case.teacher_hold[len(features) :]))
    scores, boxes = case.head.outputs(dict(spec.options).get("position", 1), hold)
    mean, m2 = hold_statistics(hold)
    targets = replace(
        case.targets,
        features=features,
        layers=layers,
        scores=scores,
        boxes=boxes,
        score_map=scores.sigmoid().amax(-1),
        hold_mean=mean,
        hold_m2=m2,
    )
    same = DetectorOutput(features, scores, boxes, layers, hold, case.output.assigned)
    return loss, mapped(same, lambda t: t.clone().requires_grad_()), targets


def test_description_is_complete(name: str) -> None:
    method = LOSSES[name]
    assert method.name == name
    assert method.__module__ == f"cache_kd.losses.{name}"
    assert method.needs and {need for need in method.needs if not re.fullmatch(r"map:\w+", need)} <= NEEDS
    assert method.reads <= READS
    assert method.default_weight > 0
    assert method.at_identity in ("zero", "stationary", "other")
    assert method.batch_rule in ("mean", "statistics")
    for text in (method.title, method.paper, method.cost, method.protocol):
        assert text and "\n" not in text
    assert re.search(r"\b(19|20)\d\d\b", method.paper)


def test_every_option_is_annotated_and_its_default_allowed(name: str) -> None:
    method = LOSSES[name]
    parameters = list(inspect.signature(method.__init__, eval_str=True).parameters.values())[3:]
    kinds = (float, int, bool, str, tuple[str, ...])
    assert all(p.kind is p.KEYWORD_ONLY and p.annotation in kinds for p in parameters)
    assert all(type(p.default) is (tuple if p.annotation == tuple[str, ...] else p.annotation) for p in parameters)
    assert set(method.allowed) <= {p.name for p in parameters}
    defaults = {p.name: p.default for p in parameters}
    method.check_options(defaults)
    assert method.needs_for(defaults) == method.needs
    assert method.reads_for(defaults) == method.reads


def test_value_when_student_equals_teacher(spec: LossSpec, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    loss, same, targets = identity_case(spec, case)
    found = loss(same, targets)
    assert found.isfinite()
    rule = AT_IDENTITY.get((spec.name, dict(spec.options).get("protocol")), LOSSES[spec.name].at_identity)
    if rule == "other":
        return
    other = loss(replace(draw_outputs(case.teacher, 5, torch.float64), assigned=same.assigned), targets)
    assert rule == "at rest" or other > found + 1e-4
    if rule == "zero":
        assert found.item() == pytest.approx(0, abs=1e-6)
        return
    assert found > 1e-4
    tensors = [*same.features, *same.layers.values(), *same.hold, same.scores, same.boxes]
    slopes = torch.autograd.grad(found, tensors, allow_unused=True)
    assert max(slope.abs().max() for slope in slopes if slope is not None) < 1e-6


def test_teacher_gets_no_gradient_and_student_does(spec: LossSpec, make_case: Cases) -> None:
    case = make_case()
    tensors = target_tensors(case.targets)
    assert all(t.requires_grad for t in tensors)
    build(spec, case)(case.output, case.targets).backward()
    assert all(t.grad is None for t in tensors)
    assert any(t.grad is not None and t.grad.abs().sum() > 1e-4 for t in case.student_tensors)


def test_every_adapter_parameter_moves(spec: LossSpec, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64, enlarged=4)  # an attention over one cell has no gradient
    loss = build(spec, case).double()
    before = {key: value.detach().clone() for key, value in loss.named_parameters()}
    apart = {id(value) for value in loss.parameters_trained_apart()}
    ours = [value for value in loss.parameters() if id(value) not in apart]
    # Plain descent by steps of one length: Adam would turn rounding noise into full steps and hide a parameter without
    # a gradient. A last convolution of zeros gives the first its gradient only in the second step.
    for _ in range(3):
        slopes = torch.autograd.grad(loss(case.output, case.targets), ours, allow_unused=True) if ours else ()
        norm = sum(slope.square().sum() for slope in slopes if slope is not None) ** 0.5
        with torch.no_grad():
            for value, slope in zip(ours, slopes, strict=True):
                value -= 0.0 if slope is None else 0.1 * slope / norm
        if not ours:
            loss(case.output, case.targets)
    assert all(value.isfinite().all() for value in loss.parameters())
    still = [key for key, value in loss.named_parameters() if (value - before[key]).abs().max() < 1e-10]
    assert still == []


def test_adapters_exist_where_channels_differ(spec: LossSpec, make_case: Cases) -> None:
    case = make_case()
    loss = build(spec, case)
    apart = {id(value) for value in loss.parameters_trained_apart()}
    trained = [value for value in loss.parameters() if id(value) not in apart]
    if spec.name in WITHOUT_ADAPTERS or not ({"features", "hold"} & (loss.needs | loss.reads)):
        assert trained == []
        return
    widths = {(layer.in_channels, layer.out_channels) for layer in loss.modules() if isinstance(layer, nn.Conv2d)}
    wanted = {(8, 12), (6, 10)}
    if isinstance(loss, CrossKD):
        slots = {
            case.teacher.hold_slot(level, branch, loss.position) for level in range(3) for branch in ("box", "cls")
        }
        wanted = {(case.student.hold[slot], case.teacher.hold[slot]) for slot in slots}
        wanted = {(ours, theirs) for ours, theirs in wanted if ours != theirs}
    assert wanted and wanted <= widths


@pytest.mark.parametrize("size", [1e3, 6e4])
def test_extreme_values_stay_finite(spec: LossSpec, size: float, make_case: Cases) -> None:
    case = make_case()

    def extreme(value: Tensor) -> Tensor:
        return value.detach().sign() * size

    boxes = extreme(case.targets.boxes)
    mean, m2 = hold_statistics([extreme(values) for values in case.teacher_hold])
    targets = replace(
        case.targets,
        features=tuple(map(extreme, case.targets.features)),
        layers={key: extreme(value) for key, value in case.targets.layers.items()},
        scores=extreme(case.targets.scores),
        boxes=boxes - boxes.amax(),
        hold_mean=mean,
        hold_m2=m2,
    )
    with torch.no_grad():
        for tensor in case.student_tensors:
            tensor.copy_(extreme(tensor))
    loss = build(spec, case)(case.output, targets)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, case))


def test_one_class(spec: LossSpec, make_case: Cases) -> None:
    case = make_case(classes=1)
    if dict(spec.options).get("protocol") == "softmax":
        with pytest.raises(
            SettingError, match=rf"loss {spec.name}: protocol=softmax with one class is constantly zero"
        ):
            build(spec, case)
        return
    loss = build(spec, case)(case.output, case.targets)
    assert loss.isfinite() and loss.abs() > 1e-4
    assert sum(grad.abs().sum() for grad in gradients(loss, case)) > 1e-4


def test_nothing_sent_and_nothing_seen(spec: LossSpec, make_case: Cases) -> None:
    case = make_case()
    targets = replace(
        case.targets,
        scores=torch.full_like(case.targets.scores, -15),
        score_map=torch.zeros_like(case.targets.score_map),
        sent=torch.zeros_like(case.targets.sent),
    )
    loss = build(spec, case)(case.output, targets)
    assert loss.isfinite() and loss.requires_grad
    assert all(grad.isfinite().all() for grad in gradients(loss, case))


@pytest.mark.parametrize(
    ("rows", "anchors"),
    [(slice(0, 3), slice(0, 14)), (slice(0, 0), slice(0, 0)), (slice(1, 2), slice(10, 11))],
    ids=["none in one image", "none in the batch", "one object"],
)
def test_few_objects(spec: LossSpec, rows: slice, anchors: slice, make_case: Cases) -> None:
    case = make_case()
    positive = torch.zeros_like(case.output.assigned.positive)
    positive[0, anchors] = True
    old = case.output.assigned
    assigned = Assignment(positive, old.cls * positive, positive * 0.7)
    targets = replace(case.targets, labels=make_labels(3, torch.float32, rows))
    loss = build(spec, case)(replace(case.output, assigned=assigned), targets)
    assert loss.isfinite() and loss.requires_grad
    assert all(grad.isfinite().all() for grad in gradients(loss, case))


def test_boxes_of_anchors_not_sent_teach_nothing(spec: LossSpec, make_case: Cases) -> None:
    case = make_case()
    loss = build(spec, case)
    *_, boxes = gradients(loss(case.output, case.targets), case)
    if boxes.dim() == 0:
        return
    unsent = ~case.targets.sent
    assert boxes[unsent].abs().sum() == 0
    assert boxes[~unsent].abs().sum() > 1e-5
    if spec.reads:
        return  # which anchors count is not left to the teacher's confidence
    dense = replace(case.targets, sent=None, scores=case.targets.scores.detach() - 3)
    *_, boxes = gradients(loss(case.output, dense), case)
    unsure = dense.scores.sigmoid().amax(-1) <= 0.05
    assert 0 < unsure.sum() < unsure.numel()
    assert boxes[unsure].abs().sum() == 0
    assert (boxes[~unsure].abs().sum(-1) > 0).all()


def test_repeating_the_batch(spec: LossSpec, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    loss = build(spec, case).double().eval()  # a critic trained between two calls would be another method

    def values(times: int, draws: int) -> Tensor:
        module, batch = deepcopy(loss), (repeated(case.output, times), repeated(case.targets, times))
        return torch.stack([module(*batch).detach() for _ in range(draws)])

    def value(times: int) -> float:
        return values(times, 1).item()

    once = values(1, 30)
    if once.unique().numel() > 1:  # random masks: the mean over draws is the same
        assert values(2, 30).mean().item() == pytest.approx(once.mean().item(), rel=0.02)
        return
    if LOSSES[spec.name].batch_rule == "mean":
        assert value(2) == pytest.approx(value(1), rel=1e-7)
        return
    cells = BATCH * case.output.features[-1][0, 0].numel()
    assert value(2) == pytest.approx(value(1), rel=1 / cells)
    assert value(16) == pytest.approx(value(8), rel=1 / (8 * cells))


def test_float64_is_kept(spec: LossSpec, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    assert build(spec, case).double()(case.output, case.targets).dtype == torch.float64


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_outputs_and_autocast_are_computed_in_float32(spec: LossSpec, kind: torch.dtype, make_case: Cases) -> None:
    case = make_case()
    loss = build(spec, case)
    half = mapped(case.output, lambda t: t.detach().to(kind))
    expected = deepcopy(loss)(mapped(half, Tensor.float), case.targets)
    with torch.autocast("cpu", kind):
        found = deepcopy(loss)(half, case.targets)
    assert found.dtype == torch.float32
    assert found.item() == expected.item()


def test_heads_without_bins(spec: LossSpec, make_case: Cases) -> None:
    case = make_case(reg_max=1)
    if spec.name == "ld":
        with pytest.raises(MismatchError, match=r"reg_max is 1, the student's 1; allowed: equal and at least 2; use"):
            build(spec, case)
        return
    loss = build(spec, case)(case.output, case.targets)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, case))


def test_the_global_random_numbers_are_left_alone(spec: LossSpec, make_case: Cases) -> None:
    case = make_case()
    loss = build(spec, case)
    before = torch.get_rng_state()
    loss(case.output, case.targets).backward()
    assert torch.equal(torch.get_rng_state(), before)


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


def test_targets_not_read_are_asked_for(spec: LossSpec, make_case: Cases) -> None:
    case = make_case()
    with pytest.raises(MismatchError, match=rf"loss {spec.name} needs .*--store features,logits"):
        build(spec, case)(case.output, TargetBatch())


def test_what_it_reads_beside_targets_is_asked_for(spec: LossSpec, make_case: Cases) -> None:
    case = make_case()
    for read in spec.reads:
        loss, output, targets = build(spec, case), case.output, case.targets
        if read == "head":
            loss.connect(None, None)
        elif read == "labels":
            targets = replace(targets, labels=None)
        else:
            output = replace(output, **({"hold": ()} if read == "hold" else {"assigned": None}))
        with pytest.raises(MismatchError, match=f"loss {spec.name} needs "):
            loss(output, targets)


def test_nothing_is_read_that_it_does_not_name(spec: LossSpec, make_case: Cases) -> None:
    case = make_case()
    needs, reads = spec.needs, spec.reads
    targets, full = TargetBatch(), case.targets
    if "features" in needs:
        targets = replace(targets, features=full.features)
    if "logits" in needs:
        targets = replace(targets, scores=full.scores, boxes=full.boxes, sent=full.sent)
    if "score_map" in needs:
        targets = replace(targets, score_map=full.score_map)
    if "hold_stats" in needs:
        targets = replace(targets, hold_mean=full.hold_mean, hold_m2=full.hold_m2)
    if "labels" in reads:
        targets = replace(targets, labels=full.labels)
    output = replace(
        case.output,
        layers={},
        hold=case.output.hold if "hold" in reads else (),
        assigned=case.output.assigned if "assignment" in reads else None,
    )
    loss = build(spec, case)
    if "head" not in reads:
        loss.connect(None, None)
    assert loss(output, targets).item() == build(spec, case)(case.output, full).item()


# Methods on maps: any pair of layers of one stride.


@pytest.mark.parametrize("name", MAP_METHODS)
@pytest.mark.parametrize(
    ("layers", "seen"),
    [(("P4",), {"P4"}), (("C4:C4",), {"C4"}), (("P4", "C4"), {"P4", "C4"}), (("P4:C4", "C4:P4"), {"P4", "C4"})],
    ids=",".join,
)
def test_named_layers_are_compared_and_no_others(
    name: str, layers: tuple[str, ...], seen: set[str], make_case: Cases
) -> None:
    case = make_case()
    method = LOSSES[name]
    if name == "fsp" and len(layers) == 1:
        with pytest.raises(CacheKDError, match=r"loss fsp.*two"):
            build(f"{name}:layers={','.join(layers)}", case)
        return
    options = {"layers": layers}
    assert method.needs_for(options) == method.needs - {"features"} | {f"map:{each}" for each in seen}
    assert set(method.student_layers(options)) == seen
    maps = {"P3": 0, "P4": 1, "P5": 2, "C4": 3}
    targets = case.targets if "P4" in seen else replace(case.targets, features=None)
    loss = build(f"{name}:layers={','.join(layers)}", case)(case.output, targets)
    slopes = gradients(loss, case)
    assert loss.isfinite()
    assert {each for each, index in maps.items() if slopes[index].abs().sum() > 1e-6} == seen


@pytest.mark.parametrize("name", MAP_METHODS)
def test_naming_the_inputs_of_the_head_changes_nothing(name: str, make_case: Cases) -> None:
    case = make_case()
    named, plain = build(f"{name}:layers=P3,P4,P5", case), build(name, case)
    assert named(case.output, case.targets).item() == plain(case.output, case.targets).item()


@pytest.mark.parametrize("name", MAP_METHODS)
def test_layers_that_cannot_be_compared_are_refused(name: str, make_case: Cases) -> None:
    case = make_case()
    with pytest.raises(MismatchError, match=rf"loss {name}: the student's C4 has stride 16, the teacher's P3 has 8"):
        build(f"{name}:layers=P4,P3:C4", case)
    with pytest.raises(MismatchError, match=rf"loss {name}: the teacher has no layer 'C5'; known: C4, P3, P4, P5; did"):
        build(f"{name}:layers=P4,C5:P5", case)
    with pytest.raises(MismatchError, match=rf"loss {name}: the student has no layer 'P6'"):
        build(f"{name}:layers=P4,P5:P6", case)
