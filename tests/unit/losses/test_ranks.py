"""What processes of one run agree on, and that alone nothing changes: sums, random rows, critics, masks, shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import Case
from torch import Tensor
from two_ranks import WORLD, on_two_ranks

from cache_kd.losses import build_loss, parse_loss
from cache_kd.losses.ranks import averaged, of_the_first, own_rows, rank_and_world, summed
from cache_kd.structures import DetectorOutput, TargetBatch
from cache_kd.student.alarms import gradient_shares

CPU = torch.device("cpu")
Cases = Callable[..., Case]
HO = "ho"
MGD = "mgd"


def numbered(rows: int) -> Tensor:
    return torch.arange(rows)[:, None] * 10


def test_alone_everything_stays_as_it_is() -> None:
    values = torch.ones(3, requires_grad=True)
    assert rank_and_world() == (0, 1)
    assert summed(values).tolist() == [1, 1, 1] and not summed(values).requires_grad
    assert averaged([values])[0] is values
    assert of_the_first(7, CPU) == 7
    assert own_rows(numbered, 3).tolist() == [[0], [10], [20]]


def exchange(rank: int) -> dict[str, Any]:
    own = torch.full((2,), float(rank + 1))
    total = summed(own)
    first, second = averaged([own, torch.tensor([[10.0 * rank]])])
    return {
        "own": own.tolist(),
        "sum": total.tolist(),
        "means": (first.tolist(), second.tolist()),
        "first": of_the_first(rank + 5, CPU),
        "rows": own_rows(numbered, 2).tolist(),
    }


def test_two_processes_agree(tmp_path: Path) -> None:
    found = on_two_ranks(exchange, tmp_path)
    assert [each["own"] for each in found] == [[1, 1], [2, 2]]
    assert [each["sum"] for each in found] == [[3, 3]] * WORLD
    assert [each["means"] for each in found] == [([1.5, 1.5], [[5.0]])] * WORLD
    assert [each["first"] for each in found] == [5, 5]
    assert [each["rows"] for each in found] == [[[0], [20]], [[10], [30]]]


def part(case: Case, rank: int) -> tuple[DetectorOutput, TargetBatch]:
    """Return one process's images of a case: every second one, as a run deals them out."""
    mine = slice(rank, None, WORLD)
    said, targets = case.output, case.targets
    maps = tuple(level[mine] for level in said.features)
    student = replace(said, features=maps, scores=said.scores[mine], boxes=said.boxes[mine])
    assert targets.features is not None and targets.scores is not None
    theirs = tuple(level[mine] for level in targets.features)
    return student, TargetBatch(features=theirs, scores=targets.scores[mine])


def built(case: Case, name: str) -> Any:
    torch.manual_seed(3)
    return build_loss(parse_loss(name), case.teacher, case.student)


def test_critics_of_two_processes_take_one_step_along_the_mean_of_their_gradients(
    make_case: Cases, tmp_path: Path
) -> None:
    case = make_case(enlarged=2)

    def train(rank: int) -> dict[str, Tensor]:
        loss = built(case, HO)
        for _ in range(3):
            loss(*part(case, rank))
        return {name: value.clone() for name, value in loss.critics.state_dict().items()}

    first, second = on_two_ranks(train, tmp_path)
    fresh = built(case, HO).critics.state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert any(not torch.equal(first[name], fresh[name]) for name in first)


def test_a_critics_step_of_two_processes_is_left_out_in_both_where_one_is_not_finite(
    make_case: Cases, tmp_path: Path
) -> None:
    case = make_case(enlarged=2)

    def train(rank: int) -> dict[str, Tensor]:
        loss = built(case, HO)
        student, targets = part(case, rank)
        loss(replace(student, scores=student.scores * (float("nan") if rank else 1.0)), targets)
        return {name: value.detach().clone() for name, value in loss.critics.named_parameters()}

    fresh = dict(built(case, HO).critics.named_parameters())
    for found in on_two_ranks(train, tmp_path):
        assert [name for name in found if not torch.equal(found[name], fresh[name])] == []


def test_masks_of_two_processes_are_those_of_one_with_the_whole_batch(make_case: Cases, tmp_path: Path) -> None:
    case = make_case(enlarged=2)

    def masks(rank: int) -> list[Tensor]:
        _, targets = part(case, rank)
        return [mask.clone() for mask in built(case, MGD)._next_masks(list(targets.features or ()))]

    whole = built(case, MGD)._next_masks(list(case.targets.features or ()))
    for rank, found in enumerate(on_two_ranks(masks, tmp_path)):
        assert all(torch.equal(mine, all_[rank::WORLD]) for mine, all_ in zip(found, whole, strict=True))
    assert not torch.equal(whole[0][0], whole[0][1])


def shares_of(rank: int | None) -> dict[str, float]:
    torch.manual_seed(0)
    level = torch.randn(4, 3)
    mine = (level if rank is None else level[rank::WORLD]).requires_grad_()
    return gradient_shares((mine**2).sum(), {"a": (mine**3).sum(), "b": mine.abs().sum()}, [mine])


def test_shares_of_two_processes_are_those_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    whole = shares_of(None)
    for found in on_two_ranks(shares_of, tmp_path):
        assert found == pytest.approx(whole, rel=1e-6)
    assert shares_of(0) != pytest.approx(whole, rel=1e-2)
