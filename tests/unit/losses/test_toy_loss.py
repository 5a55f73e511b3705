"""A method is added by one file and one line of the table: a toy one, written here, is chosen, listed and trained."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses import LOSSES, LossSpec, build_loss, parse_loss
from cache_kd.losses.catalogue import catalogue, table

FILE = '''"""In: feature maps. Out: how far their means over channels are apart."""

from typing import ClassVar

from torch import Tensor

from cache_kd.losses.maps import MapLoss
from cache_kd.losses.options import Allowed, whole


def toy_loss(student: Tensor, teacher: Tensor, *, power: int) -> Tensor:
    return (student.mean(1) - teacher.detach().mean(1)).abs().pow(power).mean()


class Toy(MapLoss):
    name = "toy"
    title = "the mean over channels"
    paper = "Toys, TOYCONF 2026"
    default_weight = 3.0
    cost = "nothing to speak of"
    allowed: ClassVar[dict[str, Allowed]] = {**MapLoss.allowed, "power": whole(1)}

    def __init__(
        self, teacher, student, *, layers: tuple[str, ...] = (), power: int = 2, exact: bool = False, share: float = 1.0
    ):
        super().__init__(teacher, student, layers=layers, power=power, exact=exact, share=share)
        self.power = power

    def term(self, student, targets):
        return sum(toy_loss(ours, theirs, power=self.power) for ours, theirs in self.maps(student, targets))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write the file, import it, and add the line to the table."""
    path = tmp_path / "toy.py"
    path.write_text(FILE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("toy", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(LOSSES, "toy", module.Toy)
    return module


def test_it_is_chosen_by_name_and_option(toy: Any) -> None:
    spec = parse_loss("toy:exact=true,power=4,layers=P4,C4,cosine=0.5")
    options = (("layers", ("P4", "C4")), ("power", 4), ("exact", True))
    assert spec == LossSpec("toy", 3.0, options, cosine=0.5)
    assert str(spec) == "toy:weight=3.0,cosine=0.5,layers=P4,C4,power=4,exact=true" and parse_loss(str(spec)) == spec
    assert (spec.needs, spec.student_layers) == ({"map:P4", "map:C4"}, ("P4", "C4"))
    assert parse_loss("toy").needs == {"features"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("power=0", "power=0 is not allowed; allowed: "),
        ("power=2.5", "power=2.5 is not allowed; allowed: whole numbers from 1"),
        ("share=nan", "share=nan is not allowed; allowed: finite numbers"),
        ("exact=yes", "exact=yes is not allowed; allowed: true, false"),
        ("powr=2", "no option 'powr'; known: balance, cosine, exact, layers, power, share, until, warmup, weight; did"),
    ],
)
def test_its_options_are_checked(option: str, message: str, toy: Any) -> None:
    with pytest.raises(SettingError, match=f"loss toy: {re.escape(message)}"):
        parse_loss(f"toy:{option}")


def test_it_is_listed(toy: Any) -> None:
    (entry,) = (entry for entry in catalogue() if entry["name"] == "toy")
    assert entry["paper"] == "Toys, TOYCONF 2026"
    assert entry["needs"] == ["features"]
    assert entry["default_weight"] == 3.0
    assert set(entry["options"]) == {"layers", "power", "exact", "share"}
    assert "toy\n  transfers  the mean over channels\n" in table()


def test_it_is_built_and_gives_the_student_a_gradient(toy: Any, make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64)
    loss = build_loss(parse_loss("toy:power=4"), case.teacher, case.student)
    found = loss(case.output, case.targets)
    pairs = zip(case.output.features, case.targets.features, strict=True)
    expected = sum((ours.mean(1) - theirs.mean(1)).detach().pow(4).mean().item() for ours, theirs in pairs)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert all(level.grad.abs().sum() > 0 for level in case.output.features)
    with pytest.raises(MismatchError, match="loss toy: the student has no layer 'C9'"):
        build_loss(parse_loss("toy:layers=C9"), case.teacher, case.student)
