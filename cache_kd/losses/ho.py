"""In: maps of class logits. Out: how little a trained critic takes the student's for the teacher's (HO)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cache_kd.errors import MismatchError
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.critic import Critic
from cache_kd.losses.level_maps import level_maps
from cache_kd.losses.numeric import at_least_float32, comparable
from cache_kd.losses.options import Allowed, above, at_least
from cache_kd.losses.ranks import averaged, own_rows
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

BETAS = (0.9, 0.99)


def ho_generator_loss(critic: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    """Return −mean critic(student), what the student lowers in the holistic distillation of one map.

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, by the Wasserstein GAN with
    gradient penalty: student maps are the fakes, teacher maps are real. Mean over the critic's scores. An adversarial
    term: its value, of either sign, says nothing by itself, and student = teacher is no minimum of it. λ outside is 0.1
    in the authors' code (SKD), 0.001 in IFVD's.

    Args:
        critic: maps (N, C, H, W) to scores.
        student: (N, C, H, W).
    """
    return -_mean(critic(at_least_float32(student)))


def ho_critic_loss(critic: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """Return mean critic(student) − mean critic(teacher), what the critic lowers beside the penalty.

    See `ho_generator_loss`. Mean over the critic's scores; 0 at student = teacher. Neither map receives gradient. The
    penalty is not in it. The authors' code multiplies the sum of both by 0.1.

    Args:
        critic: maps (N, C, H, W) to scores.
        student: (N, C, H, W). teacher: (N, C, H, W).
    """
    student, teacher = comparable(student.detach(), teacher)
    return _mean(critic(student)) - _mean(critic(teacher))


def ho_gradient_penalty(
    critic: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, *, alpha: Tensor | None = None
) -> Tensor:
    """Return 1 / N · Σ_n (‖∇ critic(α·teacher + (1 − α)·student)‖₂ − 1)², the norm over an image's whole map.

    Gulrajani et al., "Improved Training of Wasserstein GANs", NIPS 2017, which multiplies 10 outside; gradient flows to
    the critic's parameters, to neither map. The critic must score images one by one: no statistics over a batch.

    Args:
        critic: maps (N, C, H, W) to scores.
        student: (N, C, H, W). teacher: (N, C, H, W).
        alpha: (N, 1, 1, 1), the teacher's share in each image; None draws it uniformly from 0..1.
    """
    student, teacher = comparable(student.detach(), teacher)
    each = (student.shape[0], 1, 1, 1)
    if alpha is None:
        alpha = torch.rand(each, device=student.device, dtype=student.dtype)
    if alpha.shape != each:
        raise MismatchError(f"alpha is of shape {tuple(alpha.shape)}; allowed: one share an image, {each}")
    with torch.enable_grad():
        between = torch.lerp(student, teacher, alpha.detach().to(student)).requires_grad_()
        (slope,) = torch.autograd.grad(
            critic(between).sum(), between, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return _mean((torch.linalg.vector_norm(slope.flatten(1), dim=1) - 1) ** 2)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)


class HO(DistillLoss):
    """`ho_generator_loss` of the class logits of each level, summed; the module trains one critic a level.

    In training, each call first gives the critics one step of their own Adam, on `ho_critic_loss` + `penalty` ·
    `ho_gradient_penalty`, without touching the student; a step whose loss or gradient is not finite is left out. Then
    the student meets critics that take no gradient. In eval mode or without gradient the critics stay as they are. The
    optimizer's state and the place in the row of random shares α are in the state dict. On several devices all take one
    step, along the mean of their gradients.

    The critics differ from the authors', which take 65x65 maps through a batch normalisation or tanh, four 4x4
    convolutions of stride 2 and two attentions: P4 and P5 are too small for that, so these take raw logits of any size
    through 3, 2 and 1 stages on P3, P4 and P5, wide 64, 128, 256, and one attention at the end, left out where more
    than 400 cells remain. λ_d = 0.1 in front of the critic's loss is left out: Adam does not see it. Adam is IFVD's,
    4e-4 and (0.9, 0.99); SKD has plain descent.

    `at_identity` is "other": the term is what the critic thinks of the student, and may be negative; a critic that
    was misled pushes away from student = teacher as well. Of all methods it gives the least for its cost: a second
    network, differentiated twice in every step.
    """

    name = "ho"
    title = "what a critic, trained alongside, can tell apart in the class maps as a whole"
    paper = "Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019"
    needs = frozenset({"logits"})
    default_weight = 0.08
    cost = "a second network: four passes a step, differentiated twice, and its own optimizer"
    at_identity = "other"
    allowed: ClassVar[Mapping[str, Allowed]] = {"critic_lr": above(0), "penalty": at_least(0)}

    seed: Tensor
    step: Tensor

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, critic_lr: float = 4e-4, penalty: float = 10.0) -> None:
        super().__init__(teacher, student, critic_lr=critic_lr, penalty=penalty)
        self.penalty = penalty
        self.critics = nn.ModuleList(Critic(student.num_classes, _stages(tap.stride)) for tap in student.taps)
        self.optimizer = torch.optim.Adam(self.critics.parameters(), lr=critic_lr, betas=BETAS)
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def parameters_trained_apart(self) -> Iterator[nn.Parameter]:
        return self.critics.parameters()

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        ours = [at_least_float32(level) for level in level_maps(student.scores, student.features)]
        theirs = level_maps(self.required(targets.scores, "logits"), student.features)
        if self.training and torch.is_grad_enabled():
            self._train_critics(ours, theirs)
        losses = [ho_generator_loss(_frozen(critic), level) for critic, level in zip(self.critics, ours, strict=True)]
        return sum(losses[1:], losses[0])

    def _train_critics(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        generator = torch.Generator().manual_seed(int(self.seed + self.step))
        self.step += 1
        losses = []
        for critic, student, teacher in zip(self.critics, ours, theirs, strict=True):
            alpha = own_rows(lambda rows: torch.rand((rows, 1, 1, 1), generator=generator), len(student))
            alpha = alpha.to(student.device)
            apart = ho_critic_loss(critic, student, teacher)
            losses.append(apart + self.penalty * ho_gradient_penalty(critic, student, teacher, alpha=alpha))
        trained = list(self.critics.parameters())
        slopes = torch.autograd.grad(sum(losses[1:], losses[0]), trained, allow_unused=True)
        reached = [parameter for parameter, slope in zip(trained, slopes, strict=True) if slope is not None]
        # The critics are no part of DDP's graph: without this each process would train its own.
        total, *held = averaged([torch.stack(losses), *(slope for slope in slopes if slope is not None)])
        if not torch.stack([*total, torch.nn.utils.get_total_norm(held)]).isfinite().all():
            return
        for parameter, slope in zip(reached, held, strict=True):
            parameter.grad = slope
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the optimizer's state: plain numbers and tensors."""
        return {"optimizer": self.optimizer.state_dict()["state"]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the optimizer's state, copied; the options stay this module's own."""
        copies = {
            index: {key: value.clone() for key, value in moments.items()}
            for index, moments in state["optimizer"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": copies, "param_groups": groups})

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HO:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # moves the moments to their parameters
        return self


def _stages(stride: int) -> int:
    """Return 3 for P3 and finer, 2 for P4, 1 for P5 and coarser."""
    return min(max(7 - stride.bit_length(), 1), 3)


def _frozen(critic: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the critic as it is now: it takes no gradient, and a later step does not change it."""
    values = {name: parameter.detach().clone() for name, parameter in critic.named_parameters()}

    def score(maps: Tensor) -> Tensor:
        scores: Tensor = functional_call(critic, values, (maps,))
        return scores

    return score
