"""What is said of an arm is what its numbers support: gain, loss, equivalence, nothing beyond noise, nothing at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cache_kd.report.comparison import Group, compare
from cache_kd.report.findings import Findings, find, headline
from cache_kd.report.reading import Run, Runs
from cache_kd.report.record import RunRecord
from tests.unit.report.run_cases import CACHE, EPOCHS, arm, epoch, run

NOISE = (0.0, 0.004, -0.003, 0.002, -0.001)


def found_runs(records: Sequence[RunRecord]) -> tuple[Run, ...]:
    return tuple(Run(Path(f"{record.arm}-{record.seed}-{at}/record.json"), record) for at, record in enumerate(records))


def findings(records: Sequence[RunRecord]) -> Findings:
    return find(Runs(found_runs(records), ()))


def only_group(records: Sequence[RunRecord]) -> Group:
    groups, _ = compare(found_runs(records))
    assert len(groups) == 1
    return groups[0]


def against(other: Sequence[float], plain: Sequence[float] = tuple(0.36 + noise for noise in NOISE)) -> Group:
    return only_group([*arm("plain", list(plain), "plain"), *arm("cached", list(other))])


def _shifted(shift: float, own: Sequence[float]) -> list[float]:
    """Return scores that follow plain's seed by seed, `shift` higher, with noise of their own."""
    return [0.36 + noise + shift + extra for noise, extra in zip(NOISE, own, strict=True)]


@pytest.mark.parametrize(
    ("scores", "kind", "said"),
    [
        (
            _shifted(0.02, (0, 0.001, -0.001, 0, 0)),
            "better",
            r"^Better than plain: \+2\.00 points, 95 % interval \+1\.",
        ),
        (_shifted(-0.02, (0, 0.001, -0.001, 0, 0)), "worse", r"^Worse than plain: -2\.00 points, .* 5 paired seeds\.$"),
        (
            _shifted(0.0, (0.001, -0.001, 0.002, -0.001, 0.0)),
            "equivalent",
            r"^No difference to plain beyond seed noise, equivalent within one point \(p [<=] 0\.\d+\)",
        ),
        (
            _shifted(0.005, (0.02, -0.02, 0.015, -0.01, 0.0)),
            "undecided",
            r"^No difference to plain beyond seed noise: .*; equivalence within one point is not shown either",
        ),
        (
            _shifted(0.004, (0.0002, -0.0002, 0.0001, 0.0, 0.0)),
            "better",
            r"^Better than plain: \+0\.40 points.*yet the difference is smaller than one point",
        ),
    ],
)
def test_verdict_is_what_the_numbers_support(scores: list[float], kind: str, said: str) -> None:
    (comparison,) = against(scores).against
    assert comparison.verdict.kind == kind
    assert re.search(said, comparison.verdict.text), comparison.verdict.text


def test_one_seed_says_nothing_about_noise() -> None:
    (comparison,) = against([0.40], [0.36]).against
    assert comparison.verdict.kind == "one seed"
    assert comparison.verdict.text == "+4.00 points to plain, but one seed says nothing about noise: run more seeds."


def test_two_seeds_are_a_hint() -> None:
    (comparison,) = against([0.400, 0.4001], [0.36, 0.36]).against
    assert comparison.verdict.kind == "better"
    assert comparison.verdict.text.endswith("2 paired seeds. With 2 seeds only, this is a hint.")


def test_difference_is_paired_by_seed() -> None:
    """The seeds' own level, which is larger than the gain, is taken out."""
    plain = [0.30, 0.36, 0.42]
    (paired,) = against([score + 0.01 + at * 1e-4 for at, score in enumerate(plain)], plain).against
    assert paired.verdict.kind == "better"
    shuffled = [run("cached", seed, score) for seed, score in zip((2, 0, 1), (0.31, 0.3701, 0.4302), strict=True)]
    (unmatched,) = only_group([*arm("plain", plain, "plain"), *shuffled]).against
    assert unmatched.verdict.kind == "undecided"


def test_missing_plain_arm_is_said() -> None:
    found = findings([*arm("cached", [0.4, 0.41]), *arm("online", [0.39, 0.40], "online")])
    (group,) = found.groups
    assert group.group.plain is None
    assert group.group.against == ()
    assert headline(group) == "There is no plain arm: these numbers do not say whether distillation helped."
    assert any("train one with --loss none" in note for note in group.notes)
    assert [(pair.arm, pair.other) for pair in group.group.pairs] == [("cached", "online")]


def test_plain_alone_is_compared_with_nothing() -> None:
    (group,) = findings(arm("plain", [0.4, 0.41], "plain")).groups
    assert headline(group) == "Only plain is here: there is nothing to compare it with."


def test_unequal_seeds_are_said() -> None:
    group = only_group([*arm("plain", [0.36, 0.37, 0.35], "plain"), *arm("cached", [0.38, 0.39])])
    assert group.against[0].difference.seeds == (0, 1)
    expected = (
        "Seeds of cached: 0, 1; of plain: 0, 1, 2. Their difference is paired over 0, 1 only, the means are over all."
    )
    assert expected in group.notes


def test_many_arms_are_corrected_for() -> None:
    """What is significant alone is not when it is one of ten."""
    plain = [0.36 + noise for noise in NOISE]
    gain = _shifted(0.006, (0.004, -0.004, 0.003, -0.003, 0.0))
    (alone,) = against(gain, plain).against
    assert alone.verdict.kind == "better"
    noise = (0.01, -0.01, 0.008, -0.008, 0.0)
    others = [record for at in range(9) for record in arm(f"other {at}", _shifted(0.0, noise))]
    many = only_group([*arm("plain", plain, "plain"), *arm("cached", gain), *others])
    among = next(one for one in many.against if one.arm == "cached")
    assert among.difference.p == alone.difference.p
    assert among.p == pytest.approx(10 * alone.p)  # type: ignore[operator]  # it is tested, so there is one
    assert among.verdict.kind != "better"


def test_students_and_ways_of_judging_do_not_mix() -> None:
    records = [
        *arm("plain", [0.36, 0.37], "plain"),
        *arm("cached", [0.40, 0.41], student="yolov8s.yaml"),
        *arm("cached", [0.38, 0.39]),
        *arm("cached", [0.50, 0.51], judged=None, epochs=(epoch(EPOCHS, 0.5, "cached"),)),
    ]
    groups, _ = compare(found_runs(records))
    assert [group.title for group in groups] == [
        "yolov8n.yaml on bccd.yaml at 160 px, last weights on test",
        "yolov8s.yaml on bccd.yaml at 160 px, last weights on test",
        "yolov8n.yaml on bccd.yaml at 160 px, last epoch on val",
    ]
    assert [comparison.arm for group in groups for comparison in group.against] == ["cached"]


def test_last_epoch_is_said_to_be_validation() -> None:
    records = [run("plain", seed, 0.4, "plain", judged=None) for seed in (0, 1)]
    (group,) = findings(records).groups
    assert any("the scores are those of the last epoch's validation" in note for note in group.notes)


def test_run_that_was_not_validated_is_left_out() -> None:
    zeros = {"metrics/mAP50-95(B)": 0.0, "metrics/mAP50(B)": 0.0, "val/box_loss": 0.0, "train/box_loss": 1.0}
    silent = run("cached", 0, 0.4, judged=None, epochs=(*run("x", 0, 0.4).epochs[:1],))
    silent = replace(silent, epochs=(replace(silent.epochs[0], metrics=zeros),))
    found = findings([*arm("plain", [0.4], "plain"), silent])
    assert len(found.faults) == 1
    assert "no score; its last epoch was not validated" in found.faults[0]


def test_later_of_two_equal_seeds_counts() -> None:
    early = run("cached", 0, 0.30, started="2026-11-20T10:00:00+00:00")
    groups, left_out = compare(found_runs([run("cached", 0, 0.40), early]))
    assert groups[0].arms[0].points == {0: 40.0}
    assert left_out == ("cached-0-1/record.json: seed 0 of cached is there again, later: cached-0-0/record.json",)


def test_extraction_is_paid_once_and_shared() -> None:
    records = [*arm("plain", [0.36, 0.37], "plain"), *arm("a", [0.4, 0.41]), *arm("b", [0.4, 0.41])]
    (group,) = findings(records).groups
    costs = {cost.arm: cost for cost in group.costs}
    assert CACHE.extract_seconds == 40.0
    assert costs["plain"].share_seconds == 0.0
    assert costs["a"].share_seconds == costs["b"].share_seconds == 10.0
    assert costs["a"].total_seconds == costs["a"].seconds + 10.0  # type: ignore[operator]  # the cases tell seconds
    curves = {curve.arm: curve for curve in group.curves}
    assert curves["a"].seconds[0] == 10.0 + 6.0
    assert curves["plain"].seconds[0] == 5.0


def test_fewer_views_of_a_cache_are_another_cost() -> None:
    few = replace(CACHE, views=1, extract_seconds=4.0)
    (group,) = findings([*arm("K=16", [0.4, 0.41]), *arm("K=1", [0.4, 0.41], cache=few)]).groups
    assert {cost.arm: cost.share_seconds for cost in group.costs} == {"K=16": 20.0, "K=1": 2.0}


def test_equal_time_stops_everybody_when_the_first_is_done() -> None:
    records = [*arm("plain", [0.36, 0.37], "plain"), *arm("online", [0.40, 0.41], "online")]
    (group,) = findings(records).groups
    budget = group.budget
    assert budget is not None
    assert (budget.epoch, budget.seconds) == (EPOCHS, 60.0)
    assert budget.at_epoch["online"] == pytest.approx(40.5)
    # 9 s an epoch: six whole epochs in 60 s.
    expected = sum(epoch(6, score, "online").metrics["metrics/mAP50-95(B)"] or 0 for score in (0.40, 0.41)) * 50
    assert budget.at_seconds["online"] == pytest.approx(expected)


def test_term_that_never_ran_and_share_out_of_bounds_are_said() -> None:
    def changed(record: RunRecord) -> RunRecord:
        epochs = tuple(
            replace(each, metrics={**each.metrics, "train/cwd_loss": 0.0}, shares={"ld": 0.95})
            for each in record.epochs
        )
        return replace(record, epochs=epochs)

    (group,) = findings([changed(record) for record in arm("cached", [0.4, 0.41])]).groups
    assert "cached: the term cwd was 0 in every epoch; it did not train the student." in group.notes
    assert any(note.startswith("cached: ld had 95.0 % of the gradient") for note in group.notes)


@pytest.mark.parametrize(
    ("rise", "said"), [(0.004, "it has reached its plateau"), (0.006, "has not reached its plateau")]
)
def test_plateau_of_plain_is_said(rise: float, said: str) -> None:
    record = run("plain", 0, 0.4, "plain")
    epochs = tuple(
        replace(each, metrics={**each.metrics, "metrics/mAP50-95(B)": 0.4 + (rise if each.epoch == EPOCHS else 0.0)})
        for each in record.epochs
    )
    (group,) = findings([replace(record, epochs=epochs)]).groups
    assert any(said in note for note in group.notes)
