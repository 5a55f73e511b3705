"""In: maps of class logits of any size. Out: one score an image, high for the teacher's once trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WIDTHS = (64, 128, 256)
SLOPE = 0.1
ATTENTION_CELLS = 400
"""Attention is quadratic in the cells: maps of more are passed on as they are."""


class SelfAttention(nn.Module):
    """Self-attention over the cells of a map with a residual, the identity until `gain` has left 0 (SAGAN).

    The keys have no bias, which the softmax could not see, and the values none: all that follows here is linear, and a
    difference of scores would not see it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Return maps of the shape of `features`, (N, F, H, W)."""
        if features.shape[2:].numel() > ATTENTION_CELLS:
            return features
        query, key, value = (conv(features).flatten(2) for conv in (self.query, self.key, self.value))
        share = (query.transpose(1, 2) @ key).softmax(-1)  # (N, cells that look, cells looked at)
        attended: Tensor = (value @ share.transpose(1, 2)).view_as(features)
        return features + self.gain * attended


class Critic(nn.Sequential):
    """Scores (N,) of maps (N, C, H, W): stages of half the size each, self-attention, a 1x1 convolution, the mean.

    A stage is a spectral-normalised 3x3 convolution of stride 2 and a LeakyReLU; its padding lets maps of one cell
    through. The last convolution has no bias: a difference of scores cannot see one.

    Args:
        channels: C. stages: 1 to 3.
    """

    def __init__(self, channels: int, stages: int) -> None:
        layers: list[nn.Module] = []
        for width in WIDTHS[:stages]:
            layers += [spectral_norm(nn.Conv2d(channels, width, 3, 2, 1)), nn.LeakyReLU(SLOPE)]
            channels = width
        super().__init__(*layers, SelfAttention(channels), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, maps: Tensor) -> Tensor:
        """Return (N,) scores."""
        for layer in self:
            maps = layer(maps)
        return maps.mean((1, 2, 3))
