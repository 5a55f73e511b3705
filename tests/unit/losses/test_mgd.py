"""MGD: the function by hand and against its formula, the module's generators and its masks, step after step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, tensors
from torch import Tensor, nn

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses.mgd import MGD, mgd_loss
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

Cases = Callable[..., Any]
Heads = Callable[..., HeadSpec]
MASK = draw(2, 1, 3, 5, seed=7) > 0


def bend(maps: Tensor) -> Tensor:
    return maps.sin() + 0.5 * maps.roll(1, 1)


def masked(student: Tensor, teacher: Tensor) -> Tensor:
    return mgd_loss(student, teacher, generator=bend, mask=MASK)


class TestMgd(FunctionSuite):
    call = staticmethod(masked)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)
    at_identity = "other"


def test_by_hand() -> None:
    student, teacher = torch.tensor([[[[3.0, 5.0]]]]), torch.tensor([[[[1.0, 2.0]]]])
    mask = torch.tensor([[[[True, False]]]])
    assert mgd_loss(student, teacher, generator=nn.Identity(), mask=mask).item() == 2**2 + 2**2
    assert mgd_loss(student, teacher, generator=lambda maps: maps + 1, mask=mask).item() == 3**2 + 1
    assert mgd_loss(student, teacher, generator=nn.Identity(), mask=torch.ones(1, 1, 1, 2)).item() == 2**2 + 3**2
    twice = [values.expand(3, 2, 1, 2) for values in (student, teacher)]
    assert mgd_loss(*twice, generator=nn.Identity(), mask=mask.expand(3, 1, 1, 2)).item() == 2 * 8


def test_equals_the_formula() -> None:
    student, teacher = numbers(2, 3, 4, 5, seed=0), numbers(2, 3, 4, 5, seed=1)
    mask = np.random.default_rng(2).random((2, 1, 4, 5)) < 0.4
    total = 0.0
    for n, c, y, x in np.ndindex(*student.shape):
        total += (1.5 * student[n, c, y, x] * mask[n, 0, y, x] - 1 - teacher[n, c, y, x]) ** 2
    found = mgd_loss(*tensors(student, teacher), generator=lambda maps: 1.5 * maps - 1, mask=torch.from_numpy(mask))
    assert found.item() == pytest.approx(total / 2, rel=RTOL)


def test_zero_where_the_generator_rebuilds_the_teacher() -> None:
    maps = TestMgd.teacher
    assert mgd_loss(maps, bend(maps), generator=bend, mask=torch.ones_like(MASK)).item() == 0


def test_a_mask_is_bool_or_numbers_and_stops_gradient_where_it_is_0() -> None:
    student = TestMgd.student.clone().requires_grad_()
    losses = [
        mgd_loss(student, TestMgd.teacher, generator=nn.Identity(), mask=mask)
        for mask in (MASK, MASK.int(), MASK.float())
    ]
    assert len({loss.item() for loss in losses}) == 1
    losses[0].backward()
    assert torch.equal(student.grad != 0, MASK.expand_as(student))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 3, 5), (1, 1, 3, 5), (2, 1, 5, 3), (2, 1, 1, 1)])
def test_other_masks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match=r"mask is of shape .*; allowed: one value a cell, \(2, 1, 3, 5\)"):
        mgd_loss(TestMgd.student, TestMgd.teacher, generator=nn.Identity(), mask=torch.ones(shape))


def test_a_generator_must_keep_the_shape() -> None:
    with pytest.raises(MismatchError, match="must be of one shape"):
        mgd_loss(TestMgd.student, TestMgd.teacher, generator=lambda maps: maps[:, :1], mask=MASK)


def test_no_images_give_a_differentiable_zero() -> None:
    student = torch.zeros(0, 3, 3, 5, requires_grad=True)
    loss = mgd_loss(student, student.detach(), generator=nn.Identity(), mask=torch.ones(0, 1, 3, 5))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


# The module.


def build(case: Any, seed: int = 0, **options: Any) -> MGD:
    torch.manual_seed(seed)
    return MGD(case.teacher, case.student, **options).double()


def masks_seen(loss: MGD, output: DetectorOutput, targets: TargetBatch) -> list[Tensor]:
    """Return which cells of a step reach the generators, (N, 1, H, W) bool a pair."""
    seen: list[Tensor] = []
    hooks = [
        generator.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0] != 0).any(1, keepdim=True)))
        for generator in loss.generators
    ]
    loss(output, targets)
    for hook in hooks:
        hook.remove()
    return seen


def convolved(maps: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """One image (F, H, W) through a 3x3 convolution with a border of zeros."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    _, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), height, width))
    for c, y, x in np.ndindex(*out.shape):
        out[c, y, x] = (padded[:, y : y + 3, x : x + 3] * weight[c]).sum() + bias[c]
    return out


def test_module(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    loss = build(case)
    masks = masks_seen(loss, case.output, case.targets)
    loss.step.zero_()
    found = loss(case.output, case.targets).item()
    assert [type(adapter) for adapter in loss.adapters] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    expected = 0.0
    for level, mask in enumerate(masks):
        ours = loss.adapters[level](case.output.features[level]).detach().numpy()
        theirs = case.targets.features[level].detach().numpy()
        first, relu, second = loss.generators[level]
        assert isinstance(relu, nn.ReLU)
        for n in range(2):
            rebuilt = convolved(np.maximum(convolved(ours[n] * mask[n].numpy(), first), 0), second)
            expected += ((rebuilt - theirs[n]) ** 2).sum() / 2
    assert found == pytest.approx(expected, rel=RTOL)


def large(head: Heads, images: int = 4) -> tuple[MGD, DetectorOutput, TargetBatch]:
    spec = head(1, 1)
    maps = tuple(torch.ones(images, 1, 40, 40) for _ in range(2))
    empty = torch.zeros(images, 0, 0)
    torch.manual_seed(0)
    return MGD(spec, spec), DetectorOutput(maps, empty, empty), TargetBatch(maps)


@pytest.mark.parametrize("lambda_", [0.0, 0.2, 0.65])
def test_share_of_masked_cells(lambda_: float, head: Heads) -> None:
    loss, output, targets = large(head)
    loss.lambda_ = lambda_
    for mask in masks_seen(loss, output, targets):
        assert mask.shape == (4, 1, 40, 40)
        # Five standard deviations of 6400 draws.
        assert (~mask).float().mean().item() == pytest.approx(lambda_, abs=5 * (lambda_ * (1 - lambda_) / 6400) ** 0.5)


def test_default_is_the_papers(head: Heads) -> None:
    assert large(head)[0].lambda_ == 0.65


def test_every_step_pair_and_image_has_its_own_mask(head: Heads) -> None:
    loss, output, targets = large(head)
    masks = [mask for _ in range(3) for pair in masks_seen(loss, output, targets) for mask in pair]
    assert loss.step.item() == 3
    assert len({mask.numpy().tobytes() for mask in masks}) == 3 * 2 * 4
    # Unrelated, too: two masks agree by chance.
    same = (masks[0] == masks[4]).float().mean().item()
    assert same == pytest.approx(0.65**2 + 0.35**2, abs=0.07)


def test_masks_leave_the_global_stream_alone_and_do_not_read_it(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    first, second = build(case), build(case)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    value = first(case.output, case.targets).item()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert second(case.output, case.targets).item() == value


def test_another_seed_draws_other_masks(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    loss, other = build(case), build(case, seed=1)
    assert loss.seed != other.seed
    state = {key: value for key, value in loss.state_dict().items() if key != "seed"}
    other.load_state_dict(state, strict=False)
    assert loss(case.output, case.targets).item() != other(case.output, case.targets).item()


def test_a_resumed_run_goes_on_with_the_same_masks(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    loss = build(case)
    values = [loss(case.output, case.targets).item() for _ in range(2)]
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    values += [loss(case.output, case.targets).item() for _ in range(2)]
    resumed = build(case, seed=1)
    resumed.load_state_dict(state)
    assert [resumed(case.output, case.targets).item() for _ in range(2)] == values[2:]
    assert len(set(values)) == 4


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")])
def test_lambda_out_of_range(value: float, make_case: Cases) -> None:
    with pytest.raises(SettingError, match=r"loss mgd: lambda_=.* allowed: finite numbers from 0 to below 1"):
        build(make_case(), lambda_=value)
