"""In: runs. Out: all that a report says about them, as numbers; page, Markdown and JSON are made from these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cache_kd.report.comparison import Comparison, Group, compare
from cache_kd.report.costs import ArmCost, CacheUse, arm_cost, cache_uses
from cache_kd.report.json_fields import to_json
from cache_kd.report.paired_statistics import LEVEL
from cache_kd.report.progress_curves import ArmCurves, EqualBudget, curve_notes, curves, equal_budget
from cache_kd.report.reading import Run, Runs
from cache_kd.report.scores import LAST_EPOCH, score
from cache_kd.report.verdict import ALPHA, KINDS, MARGIN, signed

VERSION = 1


@dataclass(frozen=True)
class GroupFindings:
    """A group of arms with all that was found; `notes` are sentences, the group's own and those of the curves."""

    group: Group
    curves: tuple[ArmCurves, ...]
    budget: EqualBudget | None
    costs: tuple[ArmCost, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """Everything about the runs of a report; `faults` are lines about what was left out, `warnings` the runs' own."""

    runs: tuple[Run, ...]
    groups: tuple[GroupFindings, ...]
    caches: tuple[CacheUse, ...]
    faults: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def title(self) -> str:
        """What the runs are: the recipe's name, or its question, or that they are runs."""
        recipes = dict.fromkeys(run.record.recipe for run in self.runs if run.record.recipe)
        return ", ".join(recipes) or "Runs compared"

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.record.study for run in self.runs if run.record.study))


def find(read: Runs) -> Findings:
    """Return what the runs tell."""
    groups, left_out = compare(read.runs)
    uses = cache_uses(read.runs)
    found = []
    for group in groups:
        costs = tuple(arm_cost(arm, uses) for arm in group.arms)
        drawn = tuple(curves(arm, cost.share_seconds or 0.0) for arm, cost in zip(group.arms, costs, strict=True))
        notes = (*_basis_notes(group), *group.notes, *curve_notes(group, drawn), *_cost_notes(costs))
        found.append(GroupFindings(group, drawn, equal_budget(drawn), costs, notes))
    warnings = [
        f"{run.record.arm}, seed {run.record.seed}: {warning}" for run in read.runs for warning in run.record.warnings
    ]
    return Findings(read.runs, tuple(found), uses, (*read.faults, *left_out), tuple(warnings))


def _basis_notes(group: Group) -> Iterator[str]:
    if group.basis == LAST_EPOCH:
        yield (
            "Nobody judged these runs' finished weights on a split of their own: the scores are those of the last "
            "epoch's validation, on the images that also chose best.pt."
        )


def _cost_notes(costs: tuple[ArmCost, ...]) -> Iterator[str]:
    unknown = [cost.arm for cost in costs if cost.share_seconds is None]
    if unknown:
        yield f"The extraction's seconds are unknown for {', '.join(unknown)}: its time is counted without them."


def headline(found: GroupFindings) -> str:
    """Return one sentence on what the group's numbers support."""
    group = found.group
    if group.plain is None:
        return "There is no plain arm: these numbers do not say whether distillation helped."
    if not group.against:
        return f"Only {group.plain} is here: there is nothing to compare it with."
    return " ".join(_kinds(group))


def _kinds(group: Group) -> Iterator[str]:
    against: dict[str, list[Comparison]] = {}
    for comparison in sorted(group.against, key=lambda one: -one.difference.mean):
        against.setdefault(comparison.verdict.kind, []).append(comparison)
    words = {**KINDS, "better": f"better than {group.plain}", "worse": f"worse than {group.plain}"}
    for kind, text in words.items():
        if kind in against:
            names = "; ".join(f"{one.arm} ({signed(one.difference.mean)})" for one in against[kind])
            yield f"{text[0].upper()}{text[1:]}: {names}."


def to_document(findings: Findings) -> dict[str, Any]:
    """Return all numbers as one JSON document; points are mAP x 100."""
    return {
        "report": VERSION,
        "title": findings.title,
        "questions": list(findings.questions),
        "method": {"margin_points": MARGIN, "alpha": ALPHA, "interval": LEVEL, "correction": "Holm"},
        "groups": [_group_document(found) for found in findings.groups],
        "caches": to_json(findings.caches),
        "runs": [_run_document(run) for run in findings.runs],
        "faults": list(findings.faults),
        "warnings": list(findings.warnings),
    }


def _group_document(found: GroupFindings) -> dict[str, Any]:
    group = found.group
    return {
        "student": group.student,
        "data": group.data,
        "imgsz": group.imgsz,
        "basis": group.basis,
        "plain": group.plain,
        "headline": headline(found),
        "arms": [
            {
                "arm": arm.name,
                "mode": arm.mode,
                "points": {str(seed): points for seed, points in arm.points.items()},
                "mAP50-95": to_json(arm.spread),
                "mAP50": to_json(arm.spread50),
                "per_class": arm.per_class,
            }
            for arm in group.arms
        ],
        "against_plain": to_json(group.against),
        "pairs": to_json(group.pairs),
        "curves": to_json(found.curves),
        "equal_budget": to_json(found.budget),
        "costs": to_json(found.costs),
        "notes": list(found.notes),
    }


def _run_document(run: Run) -> dict[str, Any]:
    found = score(run.record)
    content = run.record.to_json()
    return {"path": str(run.path), "points": None if found is None else found.points, **content}
