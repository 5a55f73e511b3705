"""In: feature maps. Out: how well a small network rebuilds the teacher's from a masked map of the student's (MGD)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_kd.losses.maps import MapLoss, channel_adapters
from cache_kd.losses.numeric import cell_mask, comparable
from cache_kd.losses.options import Allowed, from_to_below
from cache_kd.losses.ranks import own_rows
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def mgd_loss(student: Tensor, teacher: Tensor, *, generator: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:
    """Return the masked generative distillation loss of one level.

    1/N · ‖G(S · M) − T‖², the sum of squares over channels and cells. Yang et al., "Masked Generative Distillation",
    ECCV 2022; the paper's weight is outside: α 2e-5 for one-stage detectors, 5e-7 for two-stage ones. As a sum it grows
    with channels and resolution. 0 where G rebuilds T, which at S = T it does only where nothing is masked and G is the
    identity. The authors' code is the same.

    Args:
        student: S, (N, F, H, W), after the adapter.
        teacher: T, (N, F, H, W), never receives gradient.
        generator: G, maps (N, F, H, W) to the same shape.
        mask: M, (N, 1, H, W) bool or 0/1; 1 keeps the cell.
    """
    student, teacher = comparable(student, teacher)
    rebuilt, teacher = comparable(generator(student * cell_mask(mask, student)), teacher)
    return F.mse_loss(rebuilt, teacher, reduction="sum") / max(len(teacher), 1)


class MGD(MapLoss):
    """`mgd_loss` summed over the pairs; a pair has its own generator, Conv3x3-ReLU-Conv3x3 of the teacher's channels.

    A 1x1 convolution lifts the student's map where channels differ. Every image and pair has its own mask, new at each
    step: a cell is kept where a uniform number is at most 1 − `lambda_`. The numbers follow from a seed, drawn at
    construction, the step and the pair; seed and step are buffers, so that a resumed run goes on with the same masks.
    At student = teacher the term is above 0: what is masked cannot be rebuilt exactly.

    Attributes:
        seed, step: int64 scalars; `step` counts the batches seen.
    """

    name = "mgd"
    title = "the teacher's maps, rebuilt from the student's with most cells masked"
    paper = "Masked Generative Distillation, ECCV 2022"
    default_weight = 0.0002
    cost = (
        "two 3x3 convolutions of the teacher's channels a map, the dearest of all: 10.9 GMAC an image of 640 pixels "
        "for a YOLOv8m teacher, where the whole YOLOv8n student takes 4.4; 1x1 convolution where channels differ"
    )
    at_identity = "other"
    allowed: ClassVar[Mapping[str, Allowed]] = {**MapLoss.allowed, "lambda_": from_to_below(0, 1)}
    seed: Tensor
    step: Tensor

    def __init__(
        self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = (), lambda_: float = 0.65
    ) -> None:
        super().__init__(teacher, student, layers=layers, lambda_=lambda_)
        self.lambda_ = lambda_
        self.adapters = channel_adapters(self.pairs)
        self.generators = nn.ModuleList(_generator(theirs.channels) for _, theirs in self.pairs)
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        maps = self.maps(student, targets)
        masks = self._next_masks([theirs for _, theirs in maps])
        losses = [
            mgd_loss(adapter(ours), theirs, generator=generator, mask=mask)
            for adapter, generator, (ours, theirs), mask in zip(
                self.adapters, self.generators, maps, masks, strict=True
            )
        ]
        return sum(losses[1:], losses[0])

    def _next_masks(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the (N, 1, H, W) bool mask of each map and count the step."""
        seed, step = torch.stack((self.seed, self.step)).tolist()
        self.step += 1
        masks = []
        for pair, values in enumerate(maps):
            draw = partial(_uniform, size=values.shape[2:], generator=_stream(seed, step, pair))
            numbers = own_rows(draw, len(values))
            masks.append((numbers <= 1 - self.lambda_).to(values.device))
        return masks


def _uniform(rows: int, *, size: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand((rows, 1, *size), generator=generator)


def _generator(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def _stream(*numbers: int) -> torch.Generator:
    # The CPU's generator looks at 32 bits of its seed only: a sum or shift of the three would give streams that meet.
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
