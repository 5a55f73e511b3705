"""In: feature maps and labelled boxes. Out: their difference by object, background, attention and context (FGD)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_kd.errors import MismatchError
from cache_kd.losses.labels import boxes_by_image, padded_boxes
from cache_kd.losses.maps import MapLoss, channel_adapters
from cache_kd.losses.numeric import comparable
from cache_kd.losses.options import Allowed, above, at_least
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch

# Masks of so many cells are held at a time, 64 MiB of float32: 163 boxes an image at stride 8, 640 pixels, 16 images.
MAX_CELLS = 2**24


class FGDTerms(NamedTuple):
    """The four scalars of `fgd_loss`, weighted; the loss is their sum."""

    foreground: Tensor
    background: Tensor
    attention: Tensor
    relation: Tensor


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor],
    *,
    relation_student: Callable[[Tensor], Tensor],
    relation_teacher: Callable[[Tensor], Tensor],
    temperature: float = 0.5,
    alpha: float = 2e-3,
    beta: float = 1e-3,
    gamma: float = 1e-3,
    lambda_: float = 1e-5,
) -> FGDTerms:
    """Return the four terms of focal and global distillation of one level; their sum is the loss.

    With A(F) = H·W · softmax_HW(mean_F |F| / t) over cells and C(F) = F · softmax_F(mean_HW |F| / t) over channels:
    foreground α/N · Σ M_fg · A(T)·C(T)·(S − T)², background β/N · Σ M_bg · A(T)·C(T)·(S − T)², attention
    γ/N · (‖A(S) − A(T)‖₁ + ‖C(S) − C(T)‖₁), relation λ/N · ‖R_S(S) − R_T(T)‖². Yang et al., "Focal and Global Knowledge
    Distillation for Detectors", CVPR 2022. Sums over channels and cells, means over images; 0 at S = T where R_S and
    R_T agree.

    A box covers the cells floor(x0)..ceil(x1), floor(y0)..ceil(y1), both included. M_fg there is
    1 / ((h + 1)(w + 1)) with h = ceil(y1) − floor(y0), the largest value of all boxes on the cell; M_bg is 1 / their
    number on the cells of an image that no box covers. Both as the authors' code counts; it scales boxes by the image's
    size without its padding, here they are in cells. Boxes are clipped to the map first.

    The defaults are those of the authors' code for YOLOX; it has 1e-3, 5e-4, 5e-4 and 5e-6 for one-stage detectors
    (RetinaNet, GFL), and 5e-5, 2.5e-5, 5e-5 and 5e-7 for two-stage ones.

    Args:
        student: S, (N, F, H, W), after the adapter.
        teacher: T, (N, F, H, W), never receives gradient.
        boxes: N tensors (k, 4), xyxy in cells of this map; k may be 0.
        relation_student: R_S, maps (N, F, H, W) to the same, input included (see `GcBlock`).
        relation_teacher: R_T, the same for the teacher's map; its parameters receive gradient.
        temperature: t, above 0.
        alpha, beta, gamma, lambda_: weights of foreground, background, attention and relation.
    """
    student, teacher = comparable(student, teacher)
    if len(boxes) != len(student):
        raise MismatchError(f"boxes are of {len(boxes)} images; allowed: one tensor an image, {len(student)}")
    images = max(len(student), 1)
    foreground, background = _masks(boxes, student)
    our_cells, our_channels = _attention(student, temperature)
    cells, channels = _attention(teacher, temperature)
    squares = F.mse_loss(student, teacher, reduction="none")
    gap = torch.einsum("nchw,nc->nhw", squares, channels) * cells
    attention = (our_cells - cells).abs().sum() + (our_channels - channels).abs().sum()
    relation = F.mse_loss(relation_student(student), relation_teacher(teacher), reduction="sum")
    return FGDTerms(
        (gap * foreground).sum() * (alpha / images),
        (gap * background).sum() * (beta / images),
        attention * (gamma / images),
        relation * (lambda_ / images),
    )


def _attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the attention over cells, (N, H, W) of mean 1, and over channels, (N, F) of mean 1."""
    size = maps.abs()
    images, channels, height, width = maps.shape
    cells = (size.mean(1).flatten(1) / temperature).softmax(-1) * (height * width)
    return cells.view(images, height, width), (size.mean((2, 3)) / temperature).softmax(-1) * channels


def _masks(boxes: Sequence[Tensor], maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return M_fg and M_bg, (N, H, W) each, of boxes (k, 4) xyxy in cells."""
    images, _, height, width = maps.shape
    foreground = maps.new_zeros((images, height, width))
    if any(len(rows) for rows in boxes):
        padded, real = padded_boxes([rows.detach().to(maps) for rows in boxes])
        first, last = padded[..., :2].floor(), padded[..., 2:].ceil()
        limit = maps.new_tensor((width, height))
        # The last cell may be the map's edge itself, one past its cells, which counts a cell as in the authors' code.
        sides = last.clamp(max=limit).clamp(min=0) - first.clamp(max=limit).clamp(min=0) + 1
        value = real / sides.prod(-1)
        on_x, on_y = (
            (first[..., axis, None] <= cells) & (cells <= last[..., axis, None])
            for axis, cells in enumerate(torch.arange(n, device=maps.device) for n in (width, height))
        )
        rows = value[..., None] * on_y
        chunk = max(1, MAX_CELLS // max(foreground.numel(), 1))
        for part_y, part_x in zip(torch.split(rows, chunk, 1), torch.split(on_x, chunk, 1), strict=True):
            covered = (part_y.unsqueeze(-1) * part_x.unsqueeze(-2)).amax(1)
            foreground = torch.maximum(foreground, covered)
    empty = (foreground == 0).to(maps.dtype)
    return foreground, empty / empty.sum((1, 2), keepdim=True).clamp(min=1)


class GcBlock(nn.Module):
    """Adds to every cell one vector drawn from the whole map, weighted by a learned attention over cells.

    f + W2 · ReLU(LN(W1 · Σ_j softmax_j(w · f_j) f_j)), W1 to half of the channels, W2 starting at 0. The authors' w has
    a bias, which the softmax cannot see; here it has none.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attention = nn.Conv2d(channels, 1, 1, bias=False)
        nn.init.kaiming_normal_(self.attention.weight, nonlinearity="relu")
        last = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(inplace=True), last
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (N, F, H, W) with their context."""
        share = self.attention(maps).flatten(2).softmax(-1)
        context: Tensor = self.transform((maps.flatten(2) @ share.transpose(1, 2)).unsqueeze(-1))
        return maps + context


class FGD(MapLoss):
    """The four terms of `fgd_loss`, summed over the pairs; boxes are the data set's, in cells of each map.

    A 1x1 convolution lifts the student's map where channels differ. A pair has two `GcBlock`s, one for each side, both
    trained. They start as the identity, so that in the first step only their last convolution receives gradient.
    """

    name = "fgd"
    title = "the neck's maps, objects and background apart, with their attention and global context"
    paper = "Focal and Global Knowledge Distillation for Detectors, CVPR 2022"
    reads = frozenset({"labels"})
    default_weight = 0.3
    cost = "squared difference, attentions and two context blocks a map; 1x1 convolution where channels differ"
    allowed: ClassVar[Mapping[str, Allowed]] = {
        **MapLoss.allowed,
        "temperature": above(0),
        **dict.fromkeys(("alpha", "beta", "gamma", "lambda_"), at_least(0)),
    }

    def __init__(
        self,
        teacher: HeadSpec,
        student: HeadSpec,
        *,
        layers: tuple[str, ...] = (),
        temperature: float = 0.5,
        alpha: float = 2e-3,
        beta: float = 1e-3,
        gamma: float = 1e-3,
        lambda_: float = 1e-5,
    ) -> None:
        options = {"temperature": temperature, "alpha": alpha, "beta": beta, "gamma": gamma, "lambda_": lambda_}
        super().__init__(teacher, student, layers=layers, **options)
        self.options = options
        self.adapters = channel_adapters(self.pairs)
        self.relations_student = nn.ModuleList(GcBlock(theirs.channels) for _, theirs in self.pairs)
        self.relations_teacher = nn.ModuleList(GcBlock(theirs.channels) for _, theirs in self.pairs)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        labels = self.required(targets.labels, "labels")
        maps = self.maps(student, targets)
        boxes = boxes_by_image(labels, len(maps[0][0]))
        terms: list[Tensor] = []
        for (ours, theirs), (_, tap), adapter, relation_student, relation_teacher in zip(
            maps, self.pairs, self.adapters, self.relations_student, self.relations_teacher, strict=True
        ):
            terms += fgd_loss(
                adapter(ours),
                theirs,
                [rows / tap.stride for rows in boxes],
                relation_student=relation_student,
                relation_teacher=relation_teacher,
                **self.options,
            )
        return sum(terms[1:], terms[0])
