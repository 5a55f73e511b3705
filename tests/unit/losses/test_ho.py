"""HO: the three functions by hand, what each call does to the critics, and that a resumed run goes on alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from function_suite import draw
from torch import Tensor, nn

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses import build_loss, parse_loss
from cache_kd.losses.critic import Critic, SelfAttention
from cache_kd.losses.ho import HO, ho_critic_loss, ho_generator_loss, ho_gradient_penalty
from cache_kd.losses.level_maps import level_maps
from cache_kd.structures import TargetBatch

STUDENT, TEACHER = draw(3, 2, 2, 4), draw(3, 2, 2, 4, seed=1)
SLOPE = draw(2, 2, 4, seed=2)


def linear(maps: Tensor) -> Tensor:
    return (maps * SLOPE.to(maps.dtype)).sum((1, 2, 3))


def quadratic(maps: Tensor) -> Tensor:
    return maps.square().sum((1, 2, 3)) / 2


# -- the functions --------------------------------------------------------------------------------------------------


def test_generator_loss_by_hand() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = ho_generator_loss(linear, student)
    loss.backward()
    assert loss.item() == pytest.approx(-(STUDENT * SLOPE).sum().item() / 3, rel=1e-12)
    torch.testing.assert_close(student.grad, -SLOPE.expand_as(STUDENT) / 3)
    assert torch.autograd.gradcheck(lambda s: ho_generator_loss(quadratic, s), STUDENT.clone().requires_grad_())


def test_critic_loss_by_hand() -> None:
    slope = SLOPE.clone().requires_grad_()
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss = ho_critic_loss(lambda maps: (maps * slope).sum((1, 2, 3)), student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(((STUDENT - TEACHER) * SLOPE).sum().item() / 3, rel=1e-12)
    torch.testing.assert_close(slope.grad, (STUDENT - TEACHER).mean(0))
    assert student.grad is None and teacher.grad is None
    assert ho_critic_loss(linear, TEACHER, TEACHER).item() == 0


@pytest.mark.parametrize("alpha", [None, torch.rand(3, 1, 1, 1)])
def test_penalty_of_a_linear_critic_is_that_of_its_slope(alpha: Tensor | None) -> None:
    slope = SLOPE.clone().requires_grad_()
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss = ho_gradient_penalty(lambda maps: (maps * slope).sum((1, 2, 3)), student, teacher, alpha=alpha)
    loss.backward()
    norm = SLOPE.norm()
    assert loss.item() == pytest.approx((norm.item() - 1) ** 2, rel=1e-12)
    torch.testing.assert_close(slope.grad, 2 * (norm - 1) * SLOPE / norm)
    assert student.grad is None and teacher.grad is None


def test_alpha_is_the_share_of_the_teacher_in_each_image() -> None:
    # The slope of the quadratic critic is the map itself.
    alpha = torch.tensor([0.0, 1.0, 0.25]).view(3, 1, 1, 1)
    maps = (STUDENT[0], TEACHER[1], 0.25 * TEACHER[2] + 0.75 * STUDENT[2])
    expected = sum((each.norm().item() - 1) ** 2 for each in maps) / 3
    found = ho_gradient_penalty(quadratic, STUDENT, TEACHER, alpha=alpha)
    assert found.item() == pytest.approx(expected, rel=1e-7)


def test_alpha_is_drawn_for_each_image_when_none_is_given() -> None:
    drawn: list[Tensor] = []

    def critic(maps: Tensor) -> Tensor:
        drawn.append(maps.detach())
        return quadratic(maps)

    ho_gradient_penalty(critic, torch.zeros(500, 1, 1, 2), torch.ones(500, 1, 1, 2))
    (shares,) = drawn
    assert torch.equal(shares[..., 0], shares[..., 1])
    assert shares.min() >= 0 and shares.max() <= 1
    assert shares.mean().item() == pytest.approx(0.5, abs=0.08)
    assert shares.std().item() == pytest.approx(12**-0.5, abs=0.04)


def test_penalty_of_a_flat_critic_is_finite_in_value_and_slope() -> None:
    slope = torch.zeros(2, 2, 4, dtype=torch.float64, requires_grad=True)
    loss = ho_gradient_penalty(lambda maps: (maps * slope).sum((1, 2, 3)), STUDENT, TEACHER)
    loss.backward()
    assert loss.item() == 1
    assert slope.grad is not None and slope.grad.abs().sum() == 0


def test_penalty_is_computed_where_gradients_are_off() -> None:
    with torch.no_grad():
        assert ho_gradient_penalty(linear, STUDENT, TEACHER).item() == pytest.approx((SLOPE.norm().item() - 1) ** 2)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_types(half: torch.dtype) -> None:
    student, teacher = STUDENT.to(half), TEACHER.to(half)
    assert ho_generator_loss(linear, student).dtype == torch.float32
    assert ho_critic_loss(linear, student, teacher).dtype == torch.float32
    assert ho_gradient_penalty(linear, student, teacher).dtype == torch.float32
    for loss in (ho_critic_loss, ho_gradient_penalty):
        assert loss(linear, STUDENT, teacher).dtype == torch.float64


def test_wrong_shapes_are_refused() -> None:
    for loss in (ho_critic_loss, ho_gradient_penalty):
        with pytest.raises(MismatchError, match="must be of one shape"):
            loss(linear, STUDENT, TEACHER[:1])
    with pytest.raises(MismatchError, match=r"alpha is of shape \(3,\); allowed: one share an image, \(3, 1, 1, 1\)"):
        ho_gradient_penalty(linear, STUDENT, TEACHER, alpha=torch.rand(3))


def test_no_images_give_a_differentiable_zero() -> None:
    student = torch.zeros(0, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    loss = ho_generator_loss(linear, student)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None
    assert ho_critic_loss(linear, student, TEACHER[:0]).item() == 0
    assert ho_gradient_penalty(linear, student, TEACHER[:0]).item() == 0


# -- the critic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (9, 14)])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_critic_gives_one_score_an_image(size: tuple[int, int], stages: int) -> None:
    torch.manual_seed(0)
    critic = Critic(5, stages).eval()
    maps = torch.randn(3, 5, *size)
    scores = critic(maps)
    assert scores.shape == (3,)
    torch.testing.assert_close(scores[1:2], critic(maps[1:2]))


def test_stages_fit_the_stride(make_case: Callable[..., Any]) -> None:
    loss = HO(make_case().teacher, make_case().student)
    convolutions = [[each for each in critic if isinstance(each, nn.Conv2d)] for critic in loss.critics]
    assert [[conv.out_channels for conv in critic] for critic in convolutions] == [
        [64, 128, 256, 1],
        [64, 128, 1],
        [64, 1],
    ]
    assert [[conv.stride[0] for conv in critic] for critic in convolutions] == [[2, 2, 2, 1], [2, 2, 1], [2, 1]]


def test_weights_of_stages_have_spectral_norm_one() -> None:
    torch.manual_seed(0)
    critic = Critic(5, 2)
    with torch.no_grad():
        for conv in (critic[0], critic[2]):
            conv.parametrizations.weight.original.mul_(7)
        for _ in range(30):
            critic(torch.zeros(1, 5, 4, 4))
    for conv in (critic[0], critic[2]):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, rel=2e-2)


def test_attention_by_loops() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16).double()
    maps = draw(2, 16, 2, 3)
    assert torch.equal(attention(maps), maps)
    attention.gain.data.fill_(0.7)
    found = attention(maps).flatten(2)
    for n in range(2):
        cells = [maps[n].flatten(1)[:, i] for i in range(6)]
        query, key, value = (
            [conv.weight[:, :, 0, 0] @ cell + (0 if conv.bias is None else conv.bias) for cell in cells]
            for conv in (attention.query, attention.key, attention.value)
        )
        for i in range(6):
            powers = [torch.exp(query[i] @ key[j]) for j in range(6)]
            mixed = sum(power * value[j] for j, power in enumerate(powers)) / sum(powers)
            torch.testing.assert_close(found[n, :, i], cells[i] + 0.7 * mixed)


def test_attention_leaves_large_maps_alone() -> None:
    attention = SelfAttention(8)
    attention.gain.data.fill_(1.0)
    large, small = torch.randn(1, 8, 20, 21), torch.randn(1, 8, 20, 20)
    assert attention(large) is large
    assert not torch.equal(attention(small), small)


# -- the module -----------------------------------------------------------------------------------------------------


def build(case: Any, seed: int = 0, **options: float) -> HO:
    torch.manual_seed(seed)
    return HO(case.teacher, case.student, **options)


def values(loss: HO) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loss.state_dict().items() if isinstance(tensor, Tensor)}


def unchanged(loss: HO, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in values(loss).items())


def test_one_step_is_adams_on_loss_and_penalty_then_the_student_meets_the_new_critics(
    make_case: Callable[..., Any],
) -> None:
    case = make_case(dtype=torch.float64)
    loss, twin = (build(case, penalty=3.0, critic_lr=0.01).double() for _ in range(2))
    term = loss(case.output, case.targets)
    generator = torch.Generator().manual_seed(int(twin.seed))
    maps = [level_maps(scores.detach(), case.output.features) for scores in (case.output.scores, case.targets.scores)]
    for critic, trained, ours, theirs in zip(twin.critics, loss.critics, *maps, strict=True):
        alpha = torch.rand((2, 1, 1, 1), generator=generator).double()
        apart = critic(ours).mean() - critic(theirs).mean()
        between = (alpha * theirs + (1 - alpha) * ours).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        (apart + 3 * ((slope.square().sum((1, 2, 3)).sqrt() - 1) ** 2).mean()).backward()
        for before, after in zip(critic.parameters(), trained.parameters(), strict=True):
            # Adam's first step: the gradient over its size.
            step = torch.zeros_like(before) if before.grad is None else before.grad / (before.grad.abs() + 1e-8)
            torch.testing.assert_close(after, before - 0.01 * step, rtol=1e-6, atol=1e-9)
    loss.eval()
    expected = -sum(critic(ours).mean() for critic, ours in zip(loss.critics, maps[0], strict=True))
    assert term.item() == pytest.approx(expected.item(), rel=1e-12)


def test_critics_learn_to_tell_two_distributions_apart(make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss = build(case, critic_lr=5e-3)
    output = replace(case.output, scores=case.output.scores.detach() - 2)
    targets = replace(case.targets, scores=case.targets.scores.detach() + 2)

    def gaps() -> list[float]:
        loss.eval()
        maps = [level_maps(scores, output.features) for scores in (output.scores, targets.scores)]
        found = [(critic(t).mean() - critic(s).mean()).item() for critic, s, t in zip(loss.critics, *maps, strict=True)]
        loss.train()
        return found

    first = gaps()
    for _ in range(10):
        loss(output, targets)
    assert all(after > before + 1 for before, after in zip(first, gaps(), strict=True))


def test_critics_stand_still_in_eval_and_without_gradient(make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss = build(case)
    before = values(loss)
    loss.eval()
    assert loss(case.output, case.targets).requires_grad
    assert unchanged(loss, before)
    loss.train()
    with torch.no_grad():
        loss(case.output, case.targets)
    assert loss.step == 0 and not loss.optimizer.state
    assert all(torch.equal(p, before[name]) for name, p in loss.named_parameters())
    loss(case.output, case.targets)
    assert loss.step == 1
    for level, critic in enumerate(loss.critics):
        moved = [not torch.equal(p, before[f"critics.{level}.{name}"]) for name, p in critic.named_parameters()]
        # At first the attention's gain is 0 and hides its convolutions.
        assert sum(moved) == len(moved) - 4


def test_student_gets_gradient_teacher_and_critics_none(make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss = build(case)
    loss(case.output, case.targets).backward()
    assert case.output.scores.grad is not None and (case.output.scores.grad.abs().sum((0, 2)) > 0).all()
    assert case.targets.scores.grad is None
    apart = list(loss.parameters_trained_apart())
    assert {id(p) for p in apart} == {id(p) for p in loss.parameters()} and apart
    assert all(p.grad is None and p.requires_grad for p in apart)


def test_a_later_step_leaves_an_earlier_term_as_it_was(make_case: Callable[..., Any]) -> None:
    case = make_case()
    at_once, later = build(case), build(case)
    (expected,) = torch.autograd.grad(at_once(case.output, case.targets), case.output.scores)
    term = later(case.output, case.targets)
    later(case.output, case.targets)
    (found,) = torch.autograd.grad(term, case.output.scores)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out(value: float, make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss = build(case)
    loss(case.output, case.targets)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    broken = case.targets.scores.detach().clone()
    broken[0, 3, 1] = value
    assert loss(case.output, replace(case.targets, scores=broken)).isfinite()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in loss.named_parameters())
    loss(case.output, case.targets)
    assert not any(torch.equal(p, before[n]) for n, p in loss.named_parameters() if "original" in n)
    assert all(p.isfinite().all() for p in loss.parameters())


def test_a_resumed_run_goes_on_with_the_same_numbers(make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss, resumed, forgetful = build(case), build(case, seed=1), build(case, seed=2)
    for _ in range(3):
        loss(case.output, case.targets)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    held = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(held)
    forgetful.load_state_dict({**held, "_extra_state": {"optimizer": {}}})
    for again in (False, True):
        expected = loss(case.output, case.targets)
        assert torch.equal(resumed(case.output, case.targets), expected), again
        assert not torch.equal(forgetful(case.output, case.targets), expected), again
    assert unchanged(resumed, values(loss))
    ours, theirs = loss.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])


def test_a_loaded_state_is_a_copy_and_options_stay(make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss, other = build(case, critic_lr=0.001), build(case, critic_lr=0.002)
    loss(case.output, case.targets)
    other.load_state_dict(loss.state_dict())
    before = other.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    loss(case.output, case.targets)
    assert torch.equal(other.optimizer.state_dict()["state"][0]["exp_avg"], before)
    assert other.optimizer.param_groups[0]["lr"] == 0.002


def test_the_optimizer_follows_its_parameters(make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss = build(case)
    loss(case.output, case.targets)
    loss.double()
    moments = [state[key] for state in loss.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert moments and all(moment.dtype == torch.float64 for moment in moments)
    wide = make_case(dtype=torch.float64)
    assert loss(wide.output, wide.targets).dtype == torch.float64


def test_random_shares_are_the_modules_own(make_case: Callable[..., Any]) -> None:
    case = make_case()
    loss, other = build(case), build(case, seed=1)
    assert loss.seed != other.seed
    before = torch.get_rng_state()
    loss(case.output, case.targets)
    assert torch.equal(torch.get_rng_state(), before)


def test_options_out_of_range_are_refused(make_case: Callable[..., Any]) -> None:
    case = make_case()
    with pytest.raises(SettingError, match=r"loss ho: critic_lr=0\.0 is not allowed; allowed: finite numbers above 0"):
        build_loss(parse_loss("ho:critic_lr=0"), case.teacher, case.student)
    with pytest.raises(SettingError, match=r"loss ho: penalty=-1\.0 is not allowed; allowed: finite numbers from 0"):
        build_loss(parse_loss("ho:penalty=-1"), case.teacher, case.student)
    with pytest.raises(MismatchError, match="loss ho needs logits"):
        build(case)(case.output, TargetBatch())
