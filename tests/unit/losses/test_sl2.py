"""SL2: the function by hand and against its formula, the module against Ultralytics' own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, sigmoid, tensors
from torch import Tensor

from cache_kd.errors import MismatchError
from cache_kd.losses.sl2 import SL2, sl2_loss


class TestSl2(FunctionSuite):
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)

    @staticmethod
    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return sl2_loss(student, teacher, torch.full((student.shape[0], 1, student[0, 0].numel()), 0.3))


def test_by_hand() -> None:
    # Cells weigh 1 and 0.5, two channels: (1·(1 + 4) + 0.5·(9 + 16)) / (2 · 1.5).
    teacher = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]])
    loss = sl2_loss(torch.zeros_like(teacher), teacher, torch.tensor([[[1.0, 0.5]]]))
    assert loss.item() == pytest.approx((5 + 12.5) / 3, rel=1e-6)
    assert sl2_loss(torch.zeros_like(teacher), teacher, torch.zeros(1, 1, 2)).item() == 0


def test_one_score_a_cell_is_wanted() -> None:
    with pytest.raises(
        MismatchError, match=r"teacher_score is of shape \(1, 2\); allowed: one value a cell, \(1, 1, 2\)"
    ):
        sl2_loss(torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 1, 2), torch.ones(1, 2))


def test_equals_the_formula() -> None:
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


@pytest.fixture
def distillation_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for key, value in {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}.items():
        if key not in os.environ:
            monkeypatch.setenv(key, value)
    from ultralytics.nn.distill_model import DistillationModel

    return DistillationModel


def test_module_equals_ultralytics(make_case: Callable[..., Any], distillation_model: Any) -> None:
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


def test_projector_has_the_names_of_ultralytics(make_case: Callable[..., Any]) -> None:
    case = make_case()
    state = SL2(case.teacher, case.student).state_dict()
    expected = {
        f"projector.{level}.{layer}.{kind}" for level in range(3) for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert set(state) == expected
    assert state["projector.0.0.weight"].shape == (12, 8, 1, 1)
    assert state["projector.0.2.weight"].shape == (12, 12, 1, 1)


def test_a_layer_is_weighted_by_the_scores_of_its_stride(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64)
    loss = SL2(case.teacher, case.student, layers=("C4",)).double()
    scores = case.targets.score_map[:, None, 35 : 35 + 12]
    ours, theirs = case.output.layers["C4"], case.targets.layers["C4"]
    expected = sl2_loss(loss.projector[0](ours), theirs, scores)
    assert loss(case.output, case.targets).item() == pytest.approx(expected.item(), rel=1e-12)
