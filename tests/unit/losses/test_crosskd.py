"""CrossKD: its functions by hand and against their formulas, the module through a head that is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import RowSuite, draw
from reference_math import RTOL, cross_entropy, divergence, numbers, sigmoid, softmax, tensors
from torch import Tensor, nn

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses.bckd import bckd_box_loss, bckd_cls_loss
from cache_kd.losses.crosskd import CrossKD, align_scale, batch_statistics, crosskd_box_loss, crosskd_cls_loss
from cache_kd.losses.options import written

Cases = Callable[..., Any]


class TestCls(RowSuite):
    call = staticmethod(crosskd_cls_loss)
    student, teacher = draw(5, 3), draw(5, 3, seed=1)


class TestBox(RowSuite):
    call = staticmethod(crosskd_box_loss)
    student, teacher = draw(5, 4, 4), draw(5, 4, 4, seed=1)


def cls_row(student: np.ndarray, teacher: np.ndarray, beta: float = 1.0) -> float:
    pairs = zip(sigmoid(student), sigmoid(teacher), strict=True)
    return sum(abs(ours - theirs) ** beta * cross_entropy(theirs, ours) for ours, theirs in pairs)


def box_row(student: np.ndarray, teacher: np.ndarray) -> float:
    return sum(divergence(softmax(teacher[side]), softmax(student[side])) for side in range(4)) / 4


def test_cls_by_hand() -> None:
    # p_t = 3/4, σ(z') = 1/2: |gap| = 1/4, BCE against logit 0 = log 2.
    student, teacher = torch.zeros(2, 1), torch.full((2, 1), math.log(3))
    assert crosskd_cls_loss(student, teacher).item() == pytest.approx(2 * math.log(2) / 4, rel=1e-6)
    assert crosskd_cls_loss(student, teacher, beta=2.0).item() == pytest.approx(2 * math.log(2) / 16, rel=1e-6)


def test_box_by_hand() -> None:
    # Two bins, one of four sides differs; the bins are summed.
    teacher, student = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    teacher[0, 2, 0] = math.log(3)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 4
    assert crosskd_box_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_cls_equals_the_formula(beta: float) -> None:
    student, teacher, weight = numbers(5, 3, seed=0), numbers(5, 3, seed=1), np.abs(numbers(5, seed=2))
    expected = sum(w * cls_row(s, t, beta) for s, t, w in zip(student, teacher, weight, strict=True)) / 7
    options = {"beta": beta, "weight": torch.from_numpy(weight), "normalizer": 7.0}
    ours, theirs = tensors(student, teacher)
    assert crosskd_cls_loss(ours, theirs, **options).item() == pytest.approx(expected, rel=RTOL)
    assert crosskd_cls_loss(ours, theirs, **options).item() == bckd_cls_loss(ours, theirs, **options).item()


def test_box_equals_the_formula() -> None:
    student, teacher, weight = numbers(5, 4, 8, seed=0), numbers(5, 4, 8, seed=1), np.abs(numbers(5, seed=2))
    expected = sum(w * box_row(s, t) for s, t, w in zip(student, teacher, weight, strict=True)) / 7
    found = crosskd_box_loss(*tensors(student, teacher), weight=torch.from_numpy(weight), normalizer=7.0)
    assert found.item() == pytest.approx(expected, rel=RTOL)


def aligned(student: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The formula of `align_scale`, one channel after the other."""
    result = np.empty_like(student)
    for channel in range(student.shape[1]):
        values = student[:, channel]
        scaled = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
        result[:, channel] = scaled * std[channel] + mean[channel]
    return result


def test_align_scale_equals_the_formula_in_value_and_gradient() -> None:
    student, mean, std = numbers(2, 3, 2, 4, seed=0), numbers(3, seed=1), np.abs(numbers(3, seed=2))
    ours, centre, spread = tensors(student, mean, std)
    np.testing.assert_allclose(align_scale(ours, centre, spread).numpy(), aligned(student, mean, std), rtol=1e-9)
    assert torch.autograd.gradcheck(lambda h: align_scale(h, centre, spread), ours.requires_grad_())


def test_align_scale_gives_the_teachers_statistics_and_leaves_them_alone() -> None:
    teacher, student = draw(3, 4, 5, 2), 7 * draw(3, 4, 5, 2, seed=1) + 2
    mean = teacher.mean((0, 2, 3)).requires_grad_()
    std = teacher.std((0, 2, 3)).requires_grad_()
    found = align_scale(student.requires_grad_(), mean, std)
    torch.testing.assert_close(found.mean((0, 2, 3)), mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3)), std, rtol=1e-5, atol=0)
    torch.testing.assert_close(align_scale(teacher, mean, std), teacher, rtol=1e-5, atol=1e-5)
    (found * teacher).sum().backward()
    assert mean.grad is None and std.grad is None and student.grad is not None


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 1, 1), (0, 3, 4, 4)])
def test_align_scale_of_a_constant_channel(shape: tuple[int, ...]) -> None:
    student = torch.full(shape, 5.0).requires_grad_()
    mean = torch.tensor([1.0, 2.0, 3.0])
    found = align_scale(student, mean, torch.ones(3))
    assert torch.equal(found, mean[:, None, None].expand(shape))
    found.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_align_scale_types() -> None:
    student, mean, std = draw(2, 3, 2, 2), torch.ones(3), torch.ones(3)
    assert align_scale(student, mean, std).dtype == torch.float64
    assert align_scale(student.float(), mean.double(), std.double()).dtype == torch.float32
    assert align_scale(student.half(), mean, std).dtype == torch.float32


def test_align_scale_wants_one_value_a_channel() -> None:
    for mean, std in ((torch.ones(2), torch.ones(3)), (torch.ones(3), torch.ones(1))):
        with pytest.raises(MismatchError, match=r"statistics are of shape .*allowed: one value a channel, \(3,\)"):
            align_scale(torch.zeros(2, 3, 4, 4), mean, std)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_batch_statistics_are_those_of_all_images_in_a_row(offset: float) -> None:
    maps = draw(4, 3, 5, 2) * torch.tensor([0.1, 1.0, 9.0])[:, None, None] + offset + 5 * draw(4, 1, 1, 1, seed=1)
    # float32, as targets hold them: the mean of an image is rounded, which float64 in the pooling does not make worse.
    mean = maps.mean((2, 3)).float().requires_grad_()
    m2 = (maps - mean.detach().double()[..., None, None]).square().sum((2, 3)).float().requires_grad_()
    centre, spread = batch_statistics(mean, m2, 10)
    torch.testing.assert_close(centre, maps.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(spread, maps.std((0, 2, 3)), rtol=1e-5, atol=0)
    assert spread.dtype == torch.float64 and not centre.requires_grad and not spread.requires_grad


def test_batch_statistics_are_exact_in_float64() -> None:
    maps = draw(4, 3, 5, 2) + 4 * draw(4, 3, 1, 1, seed=1)
    mean = maps.mean((2, 3))
    m2 = (maps - mean[..., None, None]).square().sum((2, 3))
    centre, spread = batch_statistics(mean, m2, 10)
    torch.testing.assert_close(centre, maps.mean((0, 2, 3)), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(spread, maps.std((0, 2, 3)), rtol=1e-12, atol=0)


def test_one_cell_has_no_deviation() -> None:
    centre, spread = batch_statistics(torch.tensor([[2.0, 3.0]]), torch.zeros(1, 2), 1)
    assert centre.tolist() == [2.0, 3.0] and spread.tolist() == [0.0, 0.0]


def connected(case: Any, *, class_map: tuple[int, ...] | None = None, **options: Any) -> CrossKD:
    torch.manual_seed(0)
    loss = CrossKD(case.teacher, case.student, **options).to(case.output.scores.dtype)
    loss.connect(case.head, class_map)
    return loss


def crossed(case: Any, loss: CrossKD, position: int) -> dict[str, np.ndarray]:
    """Logits (B, A, ·) of each branch: adapter, alignment and flattening in numpy, the known head in between."""
    adapters = iter(loss.adapters)
    found: dict[str, list[np.ndarray]] = {"box": [], "cls": []}
    for level in range(3):
        for branch, rows in found.items():
            values = case.output.hold[case.student.hold_slot(level, branch, position)].detach().numpy()
            if position or branch == "box":
                adapter = next(adapters)
            if isinstance(adapter, nn.Conv2d):
                values = np.einsum("oi,nihw->nohw", adapter.weight.detach().numpy()[:, :, 0, 0], values)
            theirs = case.teacher_hold[case.teacher.hold_slot(level, branch, position)].detach().numpy()
            channels = theirs.transpose(1, 0, 2, 3).reshape(theirs.shape[1], -1)
            values = aligned(values, channels.mean(1), channels.std(1, ddof=1))
            answer = case.head.finish(level, branch, position, torch.from_numpy(values)).numpy()
            rows.append(np.stack([[image[:, y, x] for y, x in np.ndindex(*image.shape[1:])] for image in answer]))
    return {branch: np.concatenate(rows, 1) for branch, rows in found.items()}


@pytest.mark.parametrize("reg_max", [8, 1])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_module(position: int, reg_max: int, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64, reg_max=reg_max)
    loss = connected(case, position=position, beta=1.5, box_weight=3.0)
    cross = crossed(case, loss, position)
    scores, boxes = case.targets.scores.detach().numpy(), case.targets.boxes.detach().numpy()
    sure = sigmoid(scores).max(-1)
    total = max(float(sure.sum()), 1.0)
    expected = sum(cls_row(cross["cls"][i], scores[i], 1.5) for i in np.ndindex(*sure.shape)) / total
    chosen = [i for i in np.ndindex(*sure.shape) if sure[i] > 0.05 and case.targets.sent.numpy()[i]]
    if reg_max == 1:
        # Distances may be negative, and the box inside out: what its overlap is then, the tests of bckd say.
        signs = np.array([-1, -1, 1, 1])
        pairs = (tensors(cross["box"][i][None] * signs, boxes[i][None] * signs) for i in chosen)
        rows = [bckd_box_loss(*pair).item() for pair in pairs]
    else:
        rows = [box_row(cross["box"][i].reshape(4, -1), boxes[i].reshape(4, -1)) for i in chosen]
    weights = [sure[i] for i in chosen]
    expected += 3 * sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
    assert loss(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("reg_max", [16, 1])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_zero_where_the_student_has_the_teachers_maps(position: int, reg_max: int, make_case: Cases) -> None:
    case = make_case(dtype=torch.float64, reg_max=reg_max)
    hold = tuple(h.detach() for h in case.teacher_hold)
    scores, boxes = case.head.outputs(position, hold)
    if reg_max == 1:
        case = replace(case, head=Positive(case.head))
        boxes = boxes.abs() + 1
    case = replace(
        case,
        student=case.teacher,
        output=replace(case.output, hold=hold),
        targets=replace(case.targets, scores=scores, boxes=boxes),
    )
    loss = connected(case, position=position)
    assert list(loss.parameters()) == []
    assert loss(case.output, case.targets).item() == pytest.approx(0, abs=1e-5)
    other = replace(case.output, hold=tuple(h.flip(1) for h in hold))
    assert loss(other, case.targets) > 0.1
    cls_only = connected(case, position=position, box_weight=0.0)
    assert cls_only(other, case.targets) > 0.01
    assert loss(other, case.targets) > cls_only(other, case.targets) + 0.05


class Positive:
    """A head whose distances are 1 or more."""

    def __init__(self, head: Any) -> None:
        self.head = head

    def finish(self, level: int, branch: str, position: int, hold: Tensor) -> Tensor:
        answer: Tensor = self.head.finish(level, branch, position, hold)
        return answer.abs() + 1 if branch == "box" else answer


@pytest.mark.parametrize("position", [0, 1, 2])
def test_gradient_reaches_the_students_maps_and_every_adapter_only(position: int, make_case: Cases) -> None:
    case = make_case()
    loss = connected(case, position=position)
    loss(case.output, case.targets).backward()
    read = {case.student.hold_slot(level, branch, position) for level in range(3) for branch in ("box", "cls")}
    for slot, values in enumerate(case.output.hold):
        assert (values.grad is not None and values.grad.abs().sum() > 1e-4) == (slot in read)
    assert all(p.grad is not None and p.grad.abs().sum() > 1e-4 for p in loss.parameters())
    targets = case.targets
    tensors = (targets.scores, targets.boxes, targets.hold_mean, targets.hold_m2, *case.teacher_hold)
    assert all(t.requires_grad and t.grad is None for t in tensors)
    assert case.output.scores.grad is None and case.output.boxes.grad is None


@pytest.mark.parametrize(("position", "kinds"), [(0, "cic"), (1, "iciiic"), (2, "ciiici")])
def test_adapters_stand_where_channels_differ(position: int, kinds: str, make_case: Cases) -> None:
    case = make_case()
    loss = connected(case, position=position)
    names = {"c": nn.Conv2d, "i": nn.Identity}
    assert [type(adapter) for adapter in loss.adapters] == [names[kind] for kind in kinds]
    assert all(adapter.bias is None for adapter in loss.adapters if isinstance(adapter, nn.Conv2d))


def test_default_is_the_map_after_the_first_convolution(make_case: Cases) -> None:
    case = make_case()
    expected = connected(case, position=1, beta=1.0, box_weight=4.0)(case.output, case.targets)
    assert connected(case)(case.output, case.targets).item() == expected.item()


def test_classes_are_compared_in_the_students_order(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    picked = [2, 0]
    targets = replace(case.targets, scores=case.targets.scores[..., picked])
    found = connected(case, class_map=(2, 0), box_weight=0.0)(case.output, targets)

    class Picked:
        def finish(self, level: int, branch: str, position: int, hold: Tensor) -> Tensor:
            answer: Tensor = case.head.finish(level, branch, position, hold)
            return answer[:, picked] if branch == "cls" else answer

    expected = connected(replace(case, head=Picked()), box_weight=0.0)(case.output, targets)
    assert found.item() == expected.item()
    straight = connected(replace(case, head=Picked()), class_map=(1, 0), box_weight=0.0)(case.output, targets)
    assert found.item() != pytest.approx(straight.item(), rel=1e-3)


@pytest.mark.parametrize("reg_max", [1, 8])
def test_bins_of_the_student_do_not_matter(reg_max: int, make_case: Cases) -> None:
    case = make_case()
    expected = connected(case)(case.output, case.targets)
    other = replace(
        case,
        student=replace(case.student, reg_max=reg_max),
        output=replace(case.output, boxes=case.output.boxes[..., : 4 * reg_max]),
    )
    assert connected(other)(other.output, other.targets).item() == expected.item()


def test_statistics_are_those_of_the_batch(make_case: Cases) -> None:
    """Images of unlike statistics, alone and together: their mean is not what the batch gives."""
    case = make_case(dtype=torch.float64)
    shift = torch.tensor([0.0, 6.0], dtype=torch.float64)[:, None]
    targets = replace(case.targets, hold_mean=case.targets.hold_mean + shift, sent=None)
    loss = connected(case)
    together = loss(case.output, targets)

    def image(values: Any, row: int) -> Any:
        names = ("scores", "boxes", "hold_mean", "hold_m2")
        found = {name: getattr(values, name)[row : row + 1] for name in names if hasattr(values, name)}
        if hasattr(values, "hold"):
            found["hold"] = tuple(h[row : row + 1] for h in values.hold)
        return replace(values, **found)

    alone = [loss(image(case.output, row), image(targets, row)).item() for row in range(2)]
    assert abs(together.item() / np.mean(alone) - 1) > 0.01


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_heads_without_the_position_are_refused(whose: str, make_case: Cases) -> None:
    case = make_case()
    head = getattr(case, whose)
    for hold, position, known in ((head.hold[:3], 1, "0 to 0"), ((), 0, "none"), (head.hold[:9], 2, "0 to 1")):
        heads = {"teacher": case.teacher, "student": case.student, whose: replace(head, hold=hold)}
        with pytest.raises(
            MismatchError, match=rf"position={position} is a map that the {whose}'s head does not .*positions: {known};"
        ):
            CrossKD(heads["teacher"], heads["student"], position=position)
    heads[whose] = replace(head, hold=head.hold[:3])
    assert CrossKD(heads["teacher"], heads["student"], position=0).position == 0


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("position", 3, "whole numbers from 0 to 2"),
        ("position", -1, "whole numbers from 0 to 2"),
        ("position", True, "whole numbers from 0 to 2"),
        ("position", 1.5, "whole numbers from 0 to 2"),
        ("beta", 0.5, "finite numbers from 1"),
        ("box_weight", -1.0, "finite numbers from 0"),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: Any, rule: str, make_case: Cases) -> None:
    case = make_case()
    message = rf"loss crosskd: {option}={written(value)} is not allowed; allowed: {rule}$"
    with pytest.raises(SettingError, match=message):
        CrossKD(case.teacher, case.student, **{option: value})


def test_what_is_missing_is_asked_for(make_case: Cases) -> None:
    case = make_case()
    loss = connected(case)
    for name in ("hold_mean", "hold_m2", "scores", "boxes"):
        with pytest.raises(MismatchError, match=r"loss crosskd needs (hold statistics|logits)"):
            loss(case.output, replace(case.targets, **{name: None}))
    with pytest.raises(MismatchError, match="loss crosskd needs the student's hold maps"):
        loss(replace(case.output, hold=()), case.targets)
    loss.connect(None, None)
    with pytest.raises(MismatchError, match="loss crosskd needs the teacher's head"):
        loss(case.output, case.targets)


def test_it_says_what_it_reads() -> None:
    assert CrossKD.needs == {"logits", "hold_stats"} and CrossKD.reads == {"hold", "head"}
    assert CrossKD.batch_rule == "statistics"
