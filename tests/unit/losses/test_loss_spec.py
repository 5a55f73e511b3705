"""Specs: what the command line writes is read once, checked, and written back the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_kd.errors import SettingError
from cache_kd.losses import LOSSES, DistillLoss, LossSpec, build_loss, parse_loss, parse_losses
from cache_kd.losses.options import above, at_least


@pytest.mark.parametrize("name", LOSSES)
def test_bare_name_takes_the_default_weight(name: str) -> None:
    spec = parse_loss(name)
    assert spec == LossSpec(name, LOSSES[name].default_weight)
    assert str(spec) == f"{name}:weight={LOSSES[name].default_weight}"


@pytest.mark.parametrize(
    ("text", "expected", "canonical"),
    [
        ("ld:temperature=5", LossSpec("ld", 4.2, (("temperature", 5.0),)), "ld:weight=4.2,temperature=5.0"),
        (
            "kd:protocol=softmax,weight=2",
            LossSpec("kd", 2.0, (("protocol", "softmax"),)),
            "kd:weight=2.0,protocol=softmax",
        ),
        (
            " bckd:box_weight = 0, beta=2 ",
            LossSpec("bckd", 0.55, (("beta", 2.0), ("box_weight", 0.0))),
            "bckd:weight=0.55,beta=2.0,box_weight=0.0",
        ),
        ("cwd:weight=0", LossSpec("cwd", 0.0), "cwd:weight=0.0"),
    ],
)
def test_texts(text: str, expected: LossSpec, canonical: str) -> None:
    assert parse_loss(text) == expected
    assert str(expected) == canonical
    assert parse_loss(canonical) == expected


@given(weight=st.floats(0, allow_infinity=False), temperature=st.floats(0, exclude_min=True, allow_infinity=False))
def test_text_and_spec_are_inverse(weight: float, temperature: float) -> None:
    spec = LossSpec("cwd", weight, (("temperature", temperature),))
    assert parse_loss(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cdw", r"no loss 'cdw' in 'cdw'; known: bckd, .*, sl2; did you mean 'cwd'\?"),
        ("", r"no loss '' in ''; known: bckd"),
        (
            "ld:temprature=5",
            r"loss ld: no option 'temprature'; known: temperature, weight; did you mean 'temperature'\?",
        ),
        ("mimic:temperature=5", r"loss mimic: no option 'temperature'; known: weight$"),
        ("ld:temperature=hot", r"loss ld: temperature=hot is not allowed; allowed: finite numbers above 0$"),
        ("ld:temperature=0", r"loss ld: temperature=0.0 is not allowed; allowed: finite numbers above 0$"),
        ("ld:temperature=inf", r"loss ld: temperature=inf is not allowed; allowed: finite numbers above 0$"),
        ("bckd:beta=0.5", r"loss bckd: beta=0.5 is not allowed; allowed: finite numbers from 1$"),
        ("bckd:box_weight=-1", r"loss bckd: box_weight=-1.0 is not allowed; allowed: finite numbers from 0$"),
        ("kd:protocol=softmx", r"loss kd: protocol=softmx is not allowed; allowed: sigmoid, softmax$"),
        ("kd:protocol=", r"loss kd: protocol= is not allowed; allowed: sigmoid, softmax$"),
        ("cwd:weight=-1", r"loss cwd: weight=-1 is not allowed; allowed: finite numbers from 0$"),
        ("cwd:weight=nan", r"loss cwd: weight=nan is not allowed; allowed: finite numbers from 0$"),
        ("cwd:weight=inf", r"loss cwd: weight=inf is not allowed; allowed: finite numbers from 0$"),
        ("cwd:weight=1,weight=2", r"loss cwd: weight is given twice in 'cwd:weight=1,weight=2'; give it once"),
        (
            "cwd:temperature",
            r"loss cwd: 'temperature' in 'cwd:temperature' is not key=value; known: temperature, weight",
        ),
        ("cwd:", r"loss cwd: '' in 'cwd:' is not key=value; known: temperature, weight"),
    ],
)
def test_wrong_texts_get_one_line(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        parse_loss(text)
    assert "\n" not in str(caught.value)


def test_several_keep_their_order_and_one_named_twice_is_refused() -> None:
    assert [spec.name for spec in parse_losses(["sl2", "cwd:weight=1", "ld"])] == ["sl2", "cwd", "ld"]
    with pytest.raises(SettingError, match=r"loss cwd is given 2 times; give each loss once"):
        parse_losses(["cwd", "ld", "cwd:weight=2"])


@pytest.mark.parametrize("name", LOSSES)
def test_modules_check_values_that_no_text_went_through(name: str, make_case: Any) -> None:
    case = make_case()
    for key, rule in LOSSES[name].allowed.items():
        with pytest.raises(SettingError, match=rf"loss {name}: {key}=nan is not allowed; allowed: {rule.text}$"):
            LOSSES[name](case.teacher, case.student, **{key: math.nan})


def test_rules_take_numbers_only() -> None:
    assert above(0).test(0.1) and at_least(0).test(0) and at_least(0).test(3)
    for value in (True, "1", math.inf, math.nan):
        assert not above(0).test(value) and not at_least(0).test(value)


def test_options_reach_the_module(make_case: Any) -> None:
    case = make_case()
    assert build_loss(parse_loss("ld:temperature=5"), case.teacher, case.student).temperature == 5.0
    values = [
        build_loss(parse_loss(text), case.teacher, case.student)(case.output, case.targets).item()
        for text in ("kd", "kd:protocol=softmax", "kd:temperature=2", "bckd", "bckd:beta=2", "bckd:box_weight=1")
    ]
    assert len({round(value, 6) for value in values}) == len(values)


def test_softmax_with_one_class_is_refused(make_case: Any) -> None:
    case = make_case(classes=1)
    with pytest.raises(
        SettingError, match=r"protocol=softmax with one class is constantly zero; allowed here: sigmoid"
    ):
        build_loss(parse_loss("kd:protocol=softmax"), case.teacher, case.student)


class Toy(DistillLoss):
    name = "toy"
    needs = frozenset({"logits"})
    default_weight = 3.0

    def __init__(self, teacher: Any, student: Any, *, steps: int = 2, exact: bool = False, share: float = 1.0) -> None:
        super().__init__(teacher, student, steps=steps, exact=exact)
        self.steps, self.exact, self.share = steps, exact, share

    def term(self, student: Any, targets: Any) -> torch.Tensor:
        return student.scores.sum() * self.steps


def test_a_method_is_added_by_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch, make_case: Any) -> None:
    monkeypatch.setitem(LOSSES, "toy", Toy)
    spec = parse_loss("toy:exact=true,steps=4")
    assert spec == LossSpec("toy", 3.0, (("steps", 4), ("exact", True)))
    assert str(spec) == "toy:weight=3.0,steps=4,exact=true" and parse_loss(str(spec)) == spec
    case = make_case()
    loss = build_loss(spec, case.teacher, case.student)
    assert loss(case.output, case.targets).item() == pytest.approx(4 * case.output.scores.sum().item())
    with pytest.raises(SettingError, match=r"steps=2\.5 is not allowed; allowed: whole numbers"):
        parse_loss("toy:steps=2.5")
    with pytest.raises(SettingError, match="share=nan is not allowed; allowed: finite numbers"):
        parse_loss("toy:share=nan")
    with pytest.raises(SettingError, match="exact=yes is not allowed; allowed: true, false"):
        parse_loss("toy:exact=yes")
