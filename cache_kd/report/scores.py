"""In: a run. Out: the score it is compared by, in points, and on what that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache_kd.report.record import EpochRecord, RunRecord

POINTS = 100
"""Scores are mean average precisions times this: a point is one hundredth."""
MAP, MAP50 = "metrics/mAP50-95(B)", "metrics/mAP50(B)"
LAST_EPOCH = "last epoch on val"


@dataclass(frozen=True)
class Score:
    """Points of a run: mAP50-95, mAP50 and mAP50-95 by class; `basis` says which weights on which split."""

    points: float
    points50: float | None
    per_class: Mapping[str, float | None]
    basis: str


def score(record: RunRecord) -> Score | None:
    """Return what the finished weights were judged at, else the last epoch's validation; None without either."""
    judged = record.judged
    if judged is not None:
        per_class = {name: None if value is None else value * POINTS for name, value in judged.per_class.items()}
        basis = f"{judged.weights} weights on {judged.split}"
        return Score(judged.map50_95 * POINTS, judged.map50 * POINTS, per_class, basis)
    if not record.epochs or not validated(record.epochs[-1]):
        return None
    metrics = record.epochs[-1].metrics
    value, value50 = metrics.get(MAP), metrics.get(MAP50)
    if value is None:
        return None
    return Score(value * POINTS, None if value50 is None else value50 * POINTS, {}, LAST_EPOCH)


def validated(epoch: EpochRecord) -> bool:
    """Return whether an epoch was validated: Ultralytics writes zeros for one that was not."""
    if MAP not in epoch.metrics:
        return False
    return any(value for name, value in epoch.metrics.items() if name.startswith(("metrics/", "val/")))
