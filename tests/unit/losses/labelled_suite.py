"""What NKD, DKD and WSLD promise alike: subclass `LabelledRowSuite` for the function, `LabelledModuleSuite` once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import RowSuite, draw
from reference_math import RTOL, chosen_anchors, logits

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses import LOSSES, build_loss, parse_loss
from cache_kd.structures import Assignment

Row = Callable[[np.ndarray, np.ndarray, int], float]
Labelled = tuple[tuple[int, int], int, float]  # (image, anchor), class, weight


class LabelledRowSuite(RowSuite):
    """A function of rows with a class each; `method` is its key in `LOSSES`."""

    method: str
    student, teacher = draw(5, 3), draw(5, 3, seed=1)
    extras = (torch.tensor([2, 0, 1, 0, 2]),)
    without_normalizer = "mean"

    @pytest.mark.parametrize("wrong", [3, -1, -100])
    def test_target_out_of_range_is_refused(self, wrong: int) -> None:
        target = torch.tensor([2, 0, wrong, 0, 2])
        with pytest.raises(MismatchError, match=rf"target has class {wrong}; allowed: 0 to 2"):
            self.call(self.student, self.teacher, target)

    @pytest.mark.parametrize("wrong", [torch.zeros(5, dtype=torch.int32), torch.zeros(5), torch.eye(5).long()])
    def test_target_of_other_type_or_shape_is_refused(self, wrong: torch.Tensor) -> None:
        with pytest.raises(MismatchError, match=r"allowed: one class index a row, torch.int64 of shape \(5,\)"):
            self.call(self.student, self.teacher, wrong)

    def test_target_is_the_class_of_its_own_row(self) -> None:
        order = torch.tensor([3, 1, 4, 0, 2])
        found = self.call(self.student[order], self.teacher[order], self.extras[0][order])
        assert found.item() == pytest.approx(self.loss(self.student, self.teacher).item(), rel=1e-12)
        other = self.call(self.student, self.teacher, (self.extras[0] + 1) % 3)
        assert abs(other - found) > 1e-3

    def test_classes_in_another_order_are_the_same(self) -> None:
        order = torch.tensor([1, 2, 0])
        found = self.call(self.student[:, order], self.teacher[:, order], order.argsort()[self.extras[0]])
        assert found.item() == pytest.approx(self.loss(self.student, self.teacher).item(), rel=1e-12)

    def test_unknown_protocol_is_refused(self) -> None:
        with pytest.raises(SettingError, match=r"no protocol 'sigmod'; known: sigmoid, softmax; did you mean"):
            LOSSES[self.method].function(self.student, self.teacher, *self.extras, protocol="sigmod")


def assigned(case: Any, share: float = 0.2) -> Assignment:
    images, anchors, classes = case.output.scores.shape
    random = np.random.default_rng(5)
    positive = random.random((images, anchors)) < share
    cls, quality = random.integers(classes, size=positive.shape), random.random(positive.shape)
    return Assignment(*map(torch.from_numpy, (positive, cls * positive, quality * positive)))


class LabelledModuleSuite:
    """The module: which anchors, of which class, by what weight, divided by what.

    Attributes:
        method: key in `LOSSES`.
        row: the term of one row under the module's defaults, as a static method in numpy.
    """

    method: str
    row: Row

    def total(self, case: Any, rows: Iterable[Labelled]) -> float:
        ours, theirs, _, _ = logits(case)
        return sum(weight * self.row(ours[i], theirs[i], cls) for i, cls, weight in rows)

    def term(self, case: Any, options: str = "", **changed: Any) -> torch.Tensor:
        loss = build_loss(parse_loss(f"{self.method}{options}"), case.teacher, case.student)
        return loss(replace(case.output, **changed), case.targets)

    def test_assigned_anchors(self, make_case: Callable[..., Any]) -> None:
        case = make_case(dtype=torch.float64)
        given = assigned(case)
        rows = [
            ((b, a), int(given.cls[b, a]), float(given.quality[b, a]))
            for b, a in np.ndindex(*given.positive.shape)
            if given.positive[b, a]
        ]
        assert len(rows) > 5 and sum(row[2] for row in rows) > 1
        expected = self.total(case, rows) / sum(row[2] for row in rows)
        assert self.term(case, assigned=given).item() == pytest.approx(expected, rel=RTOL)
        weak = replace(given, quality=given.quality / 100)
        assert self.term(case, assigned=weak).item() == pytest.approx(self.total(case, rows) / 100, rel=RTOL)

    def test_half_precision_quality_is_summed_in_float32(self, make_case: Callable[..., Any]) -> None:
        case = make_case()
        given = assigned(case)
        half = replace(given, quality=given.quality.half())
        full = replace(given, quality=half.quality.float())
        assert self.term(case, assigned=half).item() == self.term(case, assigned=full).item()

    @pytest.mark.parametrize("sent", [True, False])
    def test_anchors_where_the_teacher_sees_objects(self, make_case: Callable[..., Any], sent: bool) -> None:
        case = make_case(dtype=torch.float64)
        scores = case.targets.scores.detach() - 2.5
        all_sent = torch.ones_like(case.targets.sent)
        case = replace(case, targets=replace(case.targets, scores=scores, sent=case.targets.sent if sent else all_sent))
        pairs, sure, total = chosen_anchors(case)
        assert 5 < len(pairs) < sure.size
        best = case.targets.scores.argmax(-1)
        expected = self.total(case, [(i, int(best[i]), float(sure[i])) for i in pairs]) / total
        if not sent:
            case = replace(case, targets=replace(case.targets, sent=None))
        found = self.term(case, ":region=teacher", assigned=None)
        assert found.item() == pytest.approx(expected, rel=RTOL)

    @pytest.mark.parametrize("options", ["", ":region=teacher"])
    def test_no_rows_give_a_differentiable_zero(self, make_case: Callable[..., Any], options: str) -> None:
        case = make_case()
        targets = replace(case.targets, scores=torch.full_like(case.targets.scores, -15.0))
        loss = self.term(replace(case, targets=targets), options, assigned=assigned(case, share=0.0))
        assert loss.item() == 0
        (slope,) = torch.autograd.grad(loss, case.output.scores)
        assert slope.abs().sum() == 0

    def test_only_assigned_rows_read_the_assignment(self) -> None:
        assert parse_loss(self.method).reads == {"assignment"}
        assert parse_loss(f"{self.method}:region=assigned").reads == {"assignment"}
        assert parse_loss(f"{self.method}:region=teacher").reads == frozenset()

    def test_a_missing_assignment_is_asked_for(self, make_case: Callable[..., Any]) -> None:
        with pytest.raises(
            MismatchError, match=rf"loss {self.method} needs the student's assignment.*{self.method}:region=teacher"
        ):
            self.term(make_case(), assigned=None)

    def test_options_reach_the_function(self, make_case: Callable[..., Any]) -> None:
        case = make_case(dtype=torch.float64)
        given = assigned(case)
        chosen = torch.nonzero(given.positive, as_tuple=True)
        weight = given.quality[chosen]
        for option in (*sorted({"alpha", "beta", "gamma"} & {*LOSSES[self.method].allowed}), "temperature"):
            expected = LOSSES[self.method].function(
                *(scores[chosen] for scores in (case.output.scores, case.targets.scores)),
                given.cls[chosen],
                **{option: 3.0, "protocol": "softmax"},
                weight=weight,
                normalizer=weight.sum(),
            )
            found = self.term(case, f":{option}=3,protocol=softmax", assigned=given)
            assert found.item() == pytest.approx(expected.item(), rel=1e-12)

    def test_softmax_with_one_class_is_refused(self, make_case: Callable[..., Any]) -> None:
        with pytest.raises(SettingError, match=rf"one class is constantly zero.*--loss {self.method}:protocol=sigmoid"):
            self.term(make_case(classes=1), ":protocol=softmax")

    @pytest.mark.parametrize(
        ("option", "rule"),
        [
            ("temperature=0.0", "finite numbers above 0"),
            ("region=labels", "assigned, teacher"),
            ("protocol=both", "sigmoid, softmax"),
        ],
    )
    def test_values_out_of_range_are_refused(self, option: str, rule: str) -> None:
        with pytest.raises(SettingError, match=rf"loss {self.method}: {option} is not allowed; allowed: {rule}"):
            parse_loss(f"{self.method}:{option}")

    def test_factors_below_zero_are_refused(self) -> None:
        factors = {"alpha", "beta", "gamma"} & {*LOSSES[self.method].allowed}
        assert factors
        for factor in factors:
            with pytest.raises(SettingError, match=rf"{factor}=-1.0 is not allowed; allowed: finite numbers from 0"):
                parse_loss(f"{self.method}:{factor}=-1")
