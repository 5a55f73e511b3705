"""In: the arms of a group. Out: their validation, losses and gradient shares by epoch, and validation by time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cache_kd.report.comparison import Arm, Group
from cache_kd.report.record import EpochRecord, RunRecord
from cache_kd.report.scores import MAP, POINTS, validated

OWN_TERMS = ("box", "cls", "dfl")
LEAST_SHARE, MOST_SHARE = 0.01, 0.90
PLATEAU = 0.5
"""Points that a plain student may still gain over its last fifth."""


@dataclass(frozen=True)
class Series:
    """Values by epoch over the runs of an arm: mean, smallest, largest."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class ArmCurves:
    """What an arm did over time.

    Attributes:
        score: validation mAP50-95 in points; None where fewer than two epochs were validated.
        seconds: since the start at those epochs, mean over the runs, with the arm's share of the extraction first.
        extraction: that share in seconds. own: Ultralytics' loss terms. terms: distillation's, weighted.
        shares: of the gradient on the student's neck.
    """

    arm: str
    score: Series | None
    seconds: tuple[float, ...]
    extraction: float
    own: Mapping[str, Series]
    terms: Mapping[str, Series]
    shares: Mapping[str, Series]


@dataclass(frozen=True)
class EqualBudget:
    """Validation points of every arm at the same epoch and at the same second; None where an arm has none by then."""

    epoch: int
    seconds: float
    at_epoch: Mapping[str, float | None]
    at_seconds: Mapping[str, float | None]


def curves(arm: Arm, extraction: float) -> ArmCurves:
    """Return the curves of an arm whose runs each bear `extraction` seconds of extraction."""
    records = [run.run.record for run in arm.runs]
    measured = _series(records, lambda epoch: epoch.metrics.get(MAP) if validated(epoch) else None, POINTS)
    if measured is not None and len(measured.epochs) < 2:
        measured = None
    seconds: tuple[float, ...] = ()
    if measured is not None:
        clocks = [{epoch.epoch: epoch.seconds for epoch in record.epochs} for record in records]
        seconds = tuple(extraction + statistics.fmean(clock[at] for clock in clocks) for at in measured.epochs)
    terms = _by_name(records, lambda epoch: _losses(epoch.metrics))
    own = {name: terms.pop(name) for name in OWN_TERMS if name in terms}
    return ArmCurves(arm.name, measured, seconds, extraction, own, terms, _by_name(records, lambda epoch: epoch.shares))


def equal_budget(found: Sequence[ArmCurves]) -> EqualBudget | None:
    """Return where all arms stand at the epoch and the second at which the first of them ended; None without curves."""
    drawn = {curve.arm: (curve.score, curve.seconds) for curve in found if curve.score is not None}
    scored = {arm: (series, seconds) for arm, (series, seconds) in drawn.items() if series is not None}
    if len(scored) < 2:
        return None
    epoch = min(series.epochs[-1] for series, _ in scored.values())
    budget = min(seconds[-1] for _, seconds in scored.values())
    return EqualBudget(
        epoch,
        budget,
        {arm: _last(series.epochs, series.mean, epoch) for arm, (series, _) in scored.items()},
        {arm: _last(seconds, series.mean, budget) for arm, (series, seconds) in scored.items()},
    )


def curve_notes(group: Group, found: Sequence[ArmCurves]) -> list[str]:
    """Return what the curves show that a reader must know: no plateau, a term that never ran or that took over."""
    notes = []
    for curve in found:
        if curve.arm == group.plain and curve.score is not None:
            notes.append(_plateau(curve.arm, curve.score))
        for name, series in curve.terms.items():
            if not any(series.high):
                notes.append(f"{curve.arm}: the term {name} was 0 in every epoch; it did not train the student.")
        for name, series in curve.shares.items():
            middle = statistics.median(series.mean)
            if not LEAST_SHARE <= middle <= MOST_SHARE:
                notes.append(
                    f"{curve.arm}: {name} had {100 * middle:.1f} % of the gradient on the student's neck (median of "
                    f"the epochs); allowed without an alarm: {100 * LEAST_SHARE:.0f} to {100 * MOST_SHARE:.0f} %."
                )
    return notes


def _plateau(arm: str, series: Series) -> str:
    start = next(
        (at for at, epoch in enumerate(series.epochs) if epoch >= 0.8 * series.epochs[-1]), len(series.epochs) - 1
    )
    rise = series.mean[-1] - series.mean[start]
    what = f"{arm} changed by {rise + 0.0:+.2f} points over its last fifth of epochs"
    if rise < PLATEAU:
        return f"{what}: it has reached its plateau (less than {PLATEAU} points)."
    return (
        f"{what}: it has not reached its plateau, so an arm may be ahead only because it learns sooner. Train longer."
    )


def _losses(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    head, tail = "train/", "_loss"
    return {
        name[len(head) : -len(tail)]: value
        for name, value in metrics.items()
        if name.startswith(head) and name.endswith(tail)
    }


def _by_name(
    records: Sequence[RunRecord], values: Callable[[EpochRecord], Mapping[str, float | None]]
) -> dict[str, Series]:
    def named(name: str) -> Series | None:
        return _series(records, lambda epoch: values(epoch).get(name), 1)

    names = dict.fromkeys(name for record in records for epoch in record.epochs for name in values(epoch))
    return {name: series for name in names if (series := named(name)) is not None}


def _series(records: Sequence[RunRecord], value: Callable[[EpochRecord], float | None], factor: float) -> Series | None:
    """Return a value by epoch over all runs, at the epochs at which every run has one; None without any."""
    runs = [
        {epoch.epoch: found * factor for epoch in record.epochs if (found := value(epoch)) is not None}
        for record in records
    ]
    epochs = tuple(sorted(set(runs[0]).intersection(*runs[1:])))
    if not epochs:
        return None
    columns = [[run[epoch] for run in runs] for epoch in epochs]
    return Series(epochs, tuple(map(statistics.fmean, columns)), tuple(map(min, columns)), tuple(map(max, columns)))


def _last(places: Sequence[float], values: Sequence[float], limit: float) -> float | None:
    """Return the value at the last place not beyond `limit`; None where the first is beyond."""
    return next((value for at, value in zip(reversed(places), reversed(values), strict=True) if at <= limit), None)
