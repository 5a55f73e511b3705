"""Each function equals its formula written out as loops over float64 numbers, or the code of its authors."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_kd.losses.base import DistillLoss
from cache_kd.losses.bckd import BCKD, bckd_box_loss, bckd_cls_loss
from cache_kd.losses.cwd import CWD, cwd_loss
from cache_kd.losses.kd import KD, kd_loss
from cache_kd.losses.ld import LD, ld_loss
from cache_kd.losses.mimic import mimic_loss
from cache_kd.losses.sl2 import SL2, sl2_loss

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
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def binary_divergence(p: float, q: float) -> float:
    return float(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def cross_entropy(p: float, q: float) -> float:
    return float(-p * np.log(q) - (1 - p) * np.log(1 - q))


def giou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return float(inter / union - (hull - union) / hull)


def ld_row(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    sides = range(4)
    bins = student.shape[-1]
    return sum(
        divergence(softmax(teacher[e] / temperature), softmax(student[e] / temperature)) / bins * temperature**2
        for e in sides
    )


def bckd_row(student: np.ndarray, teacher: np.ndarray, beta: float = 1.0) -> float:
    pairs = zip(sigmoid(student), sigmoid(teacher), strict=True)
    return sum(abs(p - q) ** beta * cross_entropy(p, q) for q, p in pairs)


def cwd_value(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    images, channels = student.shape[:2]
    total = 0.0
    for n in range(images):
        for c in range(channels):
            p, q = softmax(teacher[n, c].ravel() / temperature), softmax(student[n, c].ravel() / temperature)
            total += divergence(p, q)
    return temperature**2 / (images * channels) * total


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd(temperature: float) -> None:
    student, teacher = numbers(2, 3, 5, 4, seed=0), numbers(2, 3, 5, 4, seed=1)
    found = cwd_loss(*tensors(student, teacher), temperature=temperature)
    assert found.item() == pytest.approx(cwd_value(student, teacher, temperature), rel=RTOL)


def test_mimic() -> None:
    student, teacher = numbers(2, 3, 5, 4, seed=0), numbers(2, 3, 5, 4, seed=1)
    expected = sum((s - t) ** 2 for s, t in zip(student.ravel(), teacher.ravel(), strict=True)) / student.size
    assert mimic_loss(*tensors(student, teacher)).item() == pytest.approx(expected, rel=RTOL)


def test_sl2() -> None:
    student, teacher = numbers(2, 3, 5, 4, seed=0), numbers(2, 3, 5, 4, seed=1)
    score = sigmoid(numbers(2, 1, 20, seed=2))
    total = 0.0
    for n in range(2):
        for c in range(3):
            for y in range(5):
                for x in range(4):
                    total += (student[n, c, y, x] - teacher[n, c, y, x]) ** 2 * score[n, 0, y * 4 + x]
    expected = total / (score.sum() * 3 + 1e-9)
    assert sl2_loss(*tensors(student, teacher, score)).item() == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("protocol", ["sigmoid", "softmax"])
def test_kd(temperature: float, protocol: str) -> None:
    student, teacher, weight = numbers(6, 4, seed=0), numbers(6, 4, seed=1), np.abs(numbers(6, seed=2))
    total = 0.0
    for s, t, w in zip(student / temperature, teacher / temperature, weight, strict=True):
        if protocol == "sigmoid":
            row = sum(binary_divergence(p, q) for p, q in zip(sigmoid(t), sigmoid(s), strict=True))
        else:
            row = divergence(softmax(t), softmax(s))
        total += w * row * temperature**2
    found = kd_loss(
        *tensors(student, teacher),
        temperature=temperature,
        protocol=protocol,
        weight=torch.from_numpy(weight),
        normalizer=7.0,
    )
    assert found.item() == pytest.approx(total / 7, rel=RTOL)


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_bckd_cls(beta: float) -> None:
    student, teacher, weight = numbers(6, 4, seed=0), numbers(6, 4, seed=1), np.abs(numbers(6, seed=2))
    expected = sum(w * bckd_row(s, t, beta) for s, t, w in zip(student, teacher, weight, strict=True)) / 7
    found = bckd_cls_loss(*tensors(student, teacher), beta=beta, weight=torch.from_numpy(weight), normalizer=7.0)
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_bckd_box() -> None:
    boxes = []
    for seed in (0, 1):
        low = numbers(8, 2, seed=seed)
        boxes.append(np.concatenate((low, low + 0.1 + np.abs(numbers(8, 2, seed=seed + 9))), 1))
    weight = np.abs(numbers(8, seed=2))
    expected = sum(w * (1 - giou(s, t)) for s, t, w in zip(*boxes, weight, strict=True)) / 7
    found = bckd_box_loss(*tensors(*boxes), weight=torch.from_numpy(weight), normalizer=7.0)
    assert found.item() == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_ld(temperature: float) -> None:
    student, teacher, weight = numbers(5, 4, 8, seed=0), numbers(5, 4, 8, seed=1), np.abs(numbers(5, seed=2))
    expected = sum(w * ld_row(s, t, temperature) for s, t, w in zip(student, teacher, weight, strict=True)) / 7
    found = ld_loss(
        *tensors(student, teacher), temperature=temperature, weight=torch.from_numpy(weight), normalizer=7.0
    )
    assert found.item() == pytest.approx(expected, rel=RTOL)


def test_default_temperatures_are_the_papers() -> None:
    student, teacher = numbers(2, 4, 8, seed=0), numbers(2, 4, 8, seed=1)
    found = ld_loss(*tensors(student, teacher)).item()
    assert found == pytest.approx(sum(map(ld_row, student, teacher, (10.0, 10.0))), rel=RTOL)
    maps = tensors(student[:, :, None], teacher[:, :, None])
    assert cwd_loss(*maps).item() == pytest.approx(cwd_value(student, teacher, 1.0), rel=RTOL)


# The modules: which anchors count, by what weight, divided by what.


def chosen_anchors(case) -> tuple[list[tuple[int, int]], np.ndarray, float]:
    """Return (image, anchor) pairs whose boxes count, max_c p_t of all, and Z."""
    sure = sigmoid(case.targets.scores.detach().numpy()).max(-1)
    sent = case.targets.sent.numpy()
    pairs = [(b, a) for b, a in np.ndindex(*sure.shape) if sent[b, a] and sure[b, a] > 0.05]
    return pairs, sure, max(float(sure.sum()), 1.0)


def as_arrays(case) -> tuple[np.ndarray, ...]:
    batch = (case.output.scores, case.targets.scores, case.output.boxes, case.targets.boxes)
    return tuple(tensor.detach().numpy() for tensor in batch)


def test_ld_module(make_case) -> None:
    case = make_case(dtype=torch.float64, reg_max=8)
    pairs, sure, total = chosen_anchors(case)
    _, _, ours, theirs = as_arrays(case)
    rows = (sure[i] * ld_row(ours[i].reshape(4, 8), theirs[i].reshape(4, 8), 10.0) for i in pairs)
    found = LD(case.teacher, case.student)(case.output, case.targets)
    assert found.item() == pytest.approx(sum(rows) / total, rel=RTOL)


def test_kd_module(make_case) -> None:
    case = make_case(dtype=torch.float64)
    _, _, total = chosen_anchors(case)
    ours, theirs, _, _ = as_arrays(case)
    values = zip(sigmoid(theirs).ravel(), sigmoid(ours).ravel(), strict=True)
    expected = sum(binary_divergence(p, q) for p, q in values) / total
    assert KD(case.teacher, case.student)(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("method", [KD, BCKD])
def test_nearly_empty_batches_are_divided_by_one(make_case, method: type[DistillLoss]) -> None:
    case = make_case(dtype=torch.float64)
    targets = replace(case.targets, scores=case.targets.scores.detach() - 15)
    ours, theirs = case.output.scores.detach().numpy(), targets.scores.numpy()
    if method is KD:
        expected = sum(binary_divergence(p, q) for p, q in zip(sigmoid(theirs).flat, sigmoid(ours).flat, strict=True))
    else:
        expected = sum(bckd_row(ours[i], theirs[i]) for i in np.ndindex(*ours.shape[:2]))
    assert method(case.teacher, case.student)(case.output, targets).item() == pytest.approx(expected, rel=RTOL)


def test_bckd_module(make_case) -> None:
    case = make_case(dtype=torch.float64, reg_max=8)
    pairs, _, total = chosen_anchors(case)
    ours, theirs, our_boxes, their_boxes = as_arrays(case)
    expected = sum(bckd_row(ours[i], theirs[i]) for i in np.ndindex(*ours.shape[:2]))
    centers = [(x + 0.5, y + 0.5) for f in case.output.features for y in range(f.shape[2]) for x in range(f.shape[3])]

    def decoded(logits: np.ndarray, anchor: int) -> np.ndarray:
        left, top, right, bottom = (float(softmax(side) @ np.arange(8)) for side in logits.reshape(4, 8))
        x, y = centers[anchor]
        return np.array([x - left, y - top, x + right, y + bottom])

    for image, anchor in pairs:
        i = (image, anchor)
        gap = np.abs(sigmoid(ours[i]) - sigmoid(theirs[i])).max()
        expected += 4.0 * gap * (1 - giou(decoded(our_boxes[i], anchor), decoded(their_boxes[i], anchor)))
    found = BCKD(case.teacher, case.student)(case.output, case.targets)
    assert found.item() == pytest.approx(expected / total, rel=RTOL)


def test_bckd_box_weight_gets_no_gradient(make_case) -> None:
    case = make_case(dtype=torch.float64)
    with_boxes, without = (BCKD(case.teacher, case.student, box_weight=w) for w in (4.0, 0.0))
    slopes = [
        torch.autograd.grad(loss(case.output, case.targets), case.output.scores)[0] for loss in (with_boxes, without)
    ]
    torch.testing.assert_close(*slopes, rtol=0, atol=0)


def test_feature_modules_sum_levels(make_case) -> None:
    case = make_case(dtype=torch.float64)
    cwd = CWD(case.teacher, case.student).double()
    levels = zip(cwd.adapters, case.output.features, case.targets.features, strict=True)
    expected = sum(cwd_value(a(s).detach().numpy(), t.detach().numpy(), 1.0) for a, s, t in levels)
    assert cwd(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


@pytest.fixture
def distillation_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for key, value in {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}.items():
        if key not in os.environ:
            monkeypatch.setenv(key, value)
    from ultralytics.nn.distill_model import DistillationModel

    return DistillationModel


def test_sl2_equals_ultralytics(make_case, distillation_model) -> None:
    case = make_case(dtype=torch.float64)
    loss = SL2(case.teacher, case.student).double()
    sizes = [f.shape[2] * f.shape[3] for f in case.output.features]
    scores = tuple(part[:, None] for part in case.targets.score_map.split(sizes, 1))
    levels = list(zip(loss.projector, case.output.features, case.targets.features, strict=True))
    expected = [
        distillation_model.loss_sl2(None, projector(ours), theirs, level, scores)
        for level, (projector, ours, theirs) in enumerate(levels)
    ]
    found = loss(case.output, case.targets)
    assert found.item() == pytest.approx(sum(expected).item(), rel=1e-9)
    slopes = [torch.autograd.grad(value, case.output.features) for value in (found, sum(expected))]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_sl2_projector_has_the_names_of_ultralytics(make_case) -> None:
    case = make_case()
    state = SL2(case.teacher, case.student).state_dict()
    expected = {
        f"projector.{level}.{layer}.{kind}" for level in range(3) for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert set(state) == expected
    assert state["projector.0.0.weight"].shape == (12, 8, 1, 1)
    assert state["projector.0.2.weight"].shape == (12, 12, 1, 1)
