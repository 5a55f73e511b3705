"""Specs: what the command line writes is read once, checked, and written back the same."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_kd.errors import SettingError
from cache_kd.losses import LOSSES, LossSpec, build_loss, parse_loss, parse_losses
from cache_kd.losses.options import above, at_least

CWD, LD, BCKD, MIMIC = (LOSSES[name].default_weight for name in ("cwd", "ld", "bckd", "mimic"))
KNOWN = "known: balance, cosine, .*temperature, until, .*warmup, weight"


@pytest.mark.parametrize("name", LOSSES)
def test_bare_name_takes_the_default_weight(name: str) -> None:
    spec = parse_loss(name)
    assert spec == LossSpec(name, LOSSES[name].default_weight)
    assert str(spec) == f"{name}:weight={LOSSES[name].default_weight}"
    assert parse_loss(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "expected", "canonical"),
    [
        ("ld:temperature=5", LossSpec("ld", LD, (("temperature", 5.0),)), f"ld:weight={LD},temperature=5.0"),
        (
            "kd:protocol=softmax,weight=2",
            LossSpec("kd", 2.0, (("protocol", "softmax"),)),
            "kd:weight=2.0,protocol=softmax",
        ),
        (
            " bckd:box_weight = 0, beta=2 ",
            LossSpec("bckd", BCKD, (("beta", 2.0), ("box_weight", 0.0))),
            f"bckd:weight={BCKD},beta=2.0,box_weight=0.0",
        ),
        ("cwd:weight=0", LossSpec("cwd", 0.0), "cwd:weight=0.0"),
        (
            "cwd:temperature=2,until=9,balance=0.2,cosine=0,warmup=3",
            LossSpec("cwd", CWD, (("temperature", 2.0),), warmup=3.0, cosine=0.0, until=9, balance=0.2),
            f"cwd:weight={CWD},warmup=3.0,cosine=0.0,until=9,balance=0.2,temperature=2.0",
        ),
        ("ld:cosine=1,warmup=0,until=0,balance=0", LossSpec("ld", LD), f"ld:weight={LD}"),
        (
            "cwd:layers=P3,C4, 8:10 ,temperature=2",
            LossSpec("cwd", CWD, (("layers", ("P3", "C4", "8:10")), ("temperature", 2.0))),
            f"cwd:weight={CWD},layers=P3,C4,8:10,temperature=2.0",
        ),
        (
            "mimic:weight=1,layers=model.6",
            LossSpec("mimic", 1.0, (("layers", ("model.6",)),)),
            "mimic:weight=1.0,layers=model.6",
        ),
        (
            "mimic:layers=,until=1",
            LossSpec("mimic", MIMIC, (("layers", ()),), until=1),
            f"mimic:weight={MIMIC},until=1,layers=",
        ),
    ],
)
def test_texts(text: str, expected: LossSpec, canonical: str) -> None:
    assert parse_loss(text) == expected
    assert str(expected) == canonical
    assert parse_loss(canonical) == expected


FINITE = st.floats(0, allow_infinity=False)
LAYER_LISTS = st.lists(st.sampled_from(["P3", "P4", "C4", "8:10", "model.6", "6:P5"]), unique=True).map(tuple)


@given(
    weight=FINITE,
    temperature=st.floats(0, exclude_min=True, allow_infinity=False),
    layers=LAYER_LISTS,
    warmup=FINITE,
    cosine=st.floats(0, 1),
    until=st.integers(0, 10**6),
    balance=st.floats(0, 0.9),
)
def test_text_and_spec_are_inverse(temperature: float, layers: tuple[str, ...], weight: float, **common: Any) -> None:
    if not weight:
        common["balance"] = 0.0  # what is off cannot be held at a share
    spec = LossSpec("cwd", weight, (("layers", layers), ("temperature", temperature)), **common)
    assert parse_loss(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cdw", r"no loss 'cdw' in 'cdw'; known: at, bckd, .*, wsld; did you mean 'cwd'\?"),
        ("", r"no loss '' in ''; known: at, bckd"),
        ("ld:temprature=5", rf"loss ld: no option 'temprature'; {KNOWN}; did you mean 'temperature'\?"),
        (
            "mimic:temperature=5",
            r"loss mimic: no option 'temperature'; known: balance, cosine, layers, until, warmup, w",
        ),
        ("ld:temperature=hot", r"loss ld: temperature=hot is not allowed; allowed: finite numbers above 0$"),
        ("ld:temperature=0", r"loss ld: temperature=0.0 is not allowed; allowed: finite numbers above 0$"),
        ("ld:temperature=inf", r"loss ld: temperature=inf is not allowed; allowed: finite numbers above 0$"),
        ("bckd:beta=0.5", r"loss bckd: beta=0.5 is not allowed; allowed: finite numbers from 1$"),
        ("bckd:box_weight=-1", r"loss bckd: box_weight=-1.0 is not allowed; allowed: finite numbers from 0$"),
        ("kd:protocol=softmx", r"loss kd: protocol=softmx is not allowed; allowed: sigmoid, softmax$"),
        ("kd:protocol=", r"loss kd: protocol= is not allowed; allowed: sigmoid, softmax$"),
        ("cwd:weight=-1", r"loss cwd: weight=-1.0 is not allowed; allowed: finite numbers from 0$"),
        ("cwd:weight=nan", r"loss cwd: weight=nan is not allowed; allowed: finite numbers from 0$"),
        ("cwd:weight=inf", r"loss cwd: weight=inf is not allowed; allowed: finite numbers from 0$"),
        ("cwd:weight=1,weight=2", r"loss cwd: weight is given twice in 'cwd:weight=1,weight=2'; give it once"),
        ("cwd:warmup=-1", r"loss cwd: warmup=-1.0 is not allowed; allowed: finite numbers from 0$"),
        ("cwd:warmup=slow", r"loss cwd: warmup=slow is not allowed; allowed: finite numbers from 0$"),
        ("cwd:cosine=1.5", r"loss cwd: cosine=1.5 is not allowed; allowed: finite numbers from 0 to 1$"),
        ("cwd:until=2.5", r"loss cwd: until=2.5 is not allowed; allowed: whole numbers from 0$"),
        ("cwd:until=-1", r"loss cwd: until=-1 is not allowed; allowed: whole numbers from 0$"),
        ("cwd:balance=0.95", r"loss cwd: balance=0.95 is not allowed; allowed: finite numbers from 0 to 0.9$"),
        ("kd:until=9,until=9", r"loss kd: until is given twice in 'kd:until=9,until=9'; give it once"),
        ("cwd:temperature", rf"loss cwd: 'temperature' in 'cwd:temperature' is not key=value; {KNOWN}"),
        ("cwd:", rf"loss cwd: '' in 'cwd:' is not key=value; {KNOWN}"),
        ("cwd:temperature=2,P3", rf"loss cwd: 'P3' in 'cwd:temperature=2,P3' is not key=value; {KNOWN}"),
        ("cwd:layers=P3,weight=1,P4", rf"loss cwd: 'P4' in 'cwd:layers=P3,weight=1,P4' is not key=value; {KNOWN}"),
        ("cwd:layers=P3,P4,P3", r"loss cwd: layers=P3,P4,P3 is not allowed; allowed: P3, P4, P5, and layers"),
        ("cwd:layers=P3,", r"loss cwd: layers=.* is not allowed; allowed: P3, P4, P5, and layers that were extracted"),
        ("cwd:layers=P3:P4:P5", r"loss cwd: layers=.*P3:P4:P5.* is not allowed; allowed: P3, P4, P5, and layers"),
        ("cwd:layers=P3,layers=P4", r"loss cwd: layers is given twice in 'cwd:layers=P3,layers=P4'; give it once"),
        ("kd:layers=P3", r"loss kd: no option 'layers'; known: balance, "),
    ],
)
def test_wrong_texts_get_one_line(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        parse_loss(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "epochs", "factors"),
    [
        ("kd", 3, [1, 1, 1]),
        ("kd:warmup=4", 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("kd:warmup=2.5", 4, [0.4, 0.8, 1, 1]),
        ("kd:warmup=0.5", 2, [1, 1]),
        ("kd:cosine=0.1", 5, [1, 0.1 + 0.9 * (2 + 2**0.5) / 4, 0.55, 0.1 + 0.9 * (2 - 2**0.5) / 4, 0.1]),
        ("kd:cosine=0", 3, [1, 0.5, 0]),
        ("kd:cosine=0", 1, [1]),  # the only epoch is the first
        ("kd:cosine=0.2", 2, [1, 0.2, 0.2, 0.2]),  # a run prolonged beyond its end stays there
        ("kd:until=2", 4, [1, 1, 0, 0]),
        ("kd:warmup=2,cosine=0.5", 3, [0.5, 0.75, 0.5]),
        ("kd:warmup=2,cosine=0.5,until=2", 3, [0.5, 0.75, 0]),
        ("kd:balance=0.3", 2, [1, 1]),  # the share is held by the trainer
    ],
)
def test_schedule_by_hand(text: str, epochs: int, factors: list[float]) -> None:
    spec = parse_loss(text)
    found = [spec.schedule(epoch, epochs) for epoch in range(len(factors))]
    assert found == pytest.approx(factors, abs=1e-12)


def test_a_spec_says_what_its_options_need() -> None:
    plain, named = parse_loss("cwd"), parse_loss("cwd:layers=P3,C4,8:10")
    assert (plain.needs, plain.student_layers) == ({"features"}, ())
    assert (named.needs, named.student_layers) == ({"map:P3", "map:C4", "map:8"}, ("P3", "C4", "10"))
    assert parse_loss("sl2:layers=C4").needs == {"map:C4", "score_map"}
    assert parse_loss("kd").needs == {"logits"}
    assert parse_loss("kd").reads == frozenset()
    assert parse_loss("crosskd").reads == LOSSES["crosskd"].reads == {"hold", "head"}


def test_several_keep_their_order_and_one_named_twice_is_refused() -> None:
    assert [spec.name for spec in parse_losses(["sl2", "cwd:weight=1", "ld"])] == ["sl2", "cwd", "ld"]
    with pytest.raises(SettingError, match=r"loss cwd is given 2 times; give each loss once"):
        parse_losses(["cwd", "ld", "cwd:weight=2"])


@pytest.mark.parametrize("name", LOSSES)
def test_modules_check_values_that_no_text_went_through(name: str, make_case: Any) -> None:
    case = make_case()
    for key, rule in LOSSES[name].allowed.items():
        with pytest.raises(
            SettingError, match=f"loss {name}: {key}=nan is not allowed; allowed: {re.escape(rule.text)}$"
        ):
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
