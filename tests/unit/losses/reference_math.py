"""Formulas written out as loops over float64 numpy numbers, for the references of several methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

RTOL = 1e-6


def numbers(*shape: int, seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) * scale


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def sigmoid(value: np.ndarray | float) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.asarray(value))))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p ‖ q) of two distributions."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def binary_divergence(p: float, q: float) -> float:
    """KL of two probabilities of yes."""
    return float(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def cross_entropy(p: float, q: float) -> float:
    """Binary cross-entropy of probability q against target p."""
    return float(-p * np.log(q) - (1 - p) * np.log(1 - q))


def giou(a: np.ndarray, b: np.ndarray) -> float:
    """Generalised IoU of two boxes xyxy."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return float(inter / union - (hull - union) / hull)


def chosen_anchors(case: Any) -> tuple[list[tuple[int, int]], np.ndarray, float]:
    """Return (image, anchor) pairs whose boxes count, max_c p_t of all, and Z."""
    sure = sigmoid(case.targets.scores.detach().numpy()).max(-1)
    sent = case.targets.sent.numpy()
    pairs = [(b, a) for b, a in np.ndindex(*sure.shape) if sent[b, a] and sure[b, a] > 0.05]
    return pairs, sure, max(float(sure.sum()), 1.0)


def logits(case: Any) -> tuple[np.ndarray, ...]:
    """Return class logits of student and teacher, then box logits of student and teacher."""
    batch = (case.output.scores, case.targets.scores, case.output.boxes, case.targets.boxes)
    return tuple(tensor.detach().numpy() for tensor in batch)
