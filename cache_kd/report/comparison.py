"""In: runs. Out: groups of arms that may be compared, each arm's spread, its difference to plain, every pair's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cache_kd.report.paired_statistics import Difference, Spread, difference, holm, spread
from cache_kd.report.reading import Run
from cache_kd.report.scores import Score, score
from cache_kd.report.verdict import MARGIN, Verdict, judge

PLAIN = "plain"


@dataclass(frozen=True)
class Scored:
    """A run with its score."""

    run: Run
    score: Score

    @property
    def seed(self) -> int:
        return self.run.record.seed


@dataclass(frozen=True)
class Arm:
    """What is compared: runs that differ by their seed only, one a seed, in order of seeds."""

    name: str
    mode: str
    runs: tuple[Scored, ...]

    @property
    def points(self) -> dict[int, float]:
        """mAP50-95 in points by seed."""
        return {run.seed: run.score.points for run in self.runs}

    @property
    def spread(self) -> Spread:
        return spread(list(self.points.values()))

    @property
    def spread50(self) -> Spread | None:
        """Spread of mAP50, where every run has one."""
        values = [run.score.points50 for run in self.runs if run.score.points50 is not None]
        return spread(values) if len(values) == len(self.runs) else None

    @property
    def per_class(self) -> dict[str, float]:
        """Mean points by class over the runs that tell them."""
        names = dict.fromkeys(name for run in self.runs for name in run.score.per_class)
        told = {name: [run.score.per_class.get(name) for run in self.runs] for name in names}
        whole = {name: [value for value in values if value is not None] for name, values in told.items()}
        return {name: sum(values) / len(values) for name, values in whole.items() if values}


@dataclass(frozen=True)
class Comparison:
    """One arm against another; both p-values are corrected after Holm for all comparisons made with it."""

    arm: str
    other: str
    difference: Difference
    p: float | None
    p_equivalent: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Group:
    """Arms with the same student, data, image size and way of judging.

    Attributes:
        plain: name of the arm that the others are compared with; None where there is none.
        against: every other arm compared with it. pairs: every pair of other arms.
        notes: what a reader must know, a sentence each.
    """

    student: str
    data: str
    imgsz: str
    basis: str
    arms: tuple[Arm, ...]
    plain: str | None
    against: tuple[Comparison, ...]
    pairs: tuple[Comparison, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.student} on {self.data} at {self.imgsz} px, {self.basis}"

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def compare(runs: Sequence[Run]) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """Return the groups in order of their first run, and one line for every run that cannot be counted."""
    left_out: list[str] = []
    members: dict[tuple[str, str, str, str], list[Scored]] = {}
    for run in runs:
        found = score(run.record)
        if found is None:
            left_out.append(f"{run.path}: no score; its last epoch was not validated and nobody judged its weights")
            continue
        record = run.record
        key = (record.student, record.data, str(record.settings.get("imgsz", "unknown")), found.basis)
        members.setdefault(key, []).append(Scored(run, found))
    groups = []
    for key, scored in members.items():
        arms, repeated = _arms(scored)
        left_out += repeated
        groups.append(_group(key, arms))
    return tuple(groups), tuple(left_out)


def _arms(scored: Iterable[Scored]) -> tuple[list[Arm], list[str]]:
    """Return the arms, plain first, then by mean; of two runs of one arm and seed the later counts, one is said."""
    by_arm: dict[tuple[str, str], dict[int, Scored]] = {}
    repeated = []
    for run in sorted(scored, key=lambda one: (one.run.record.started, str(one.run.path))):
        record = run.run.record
        seeds = by_arm.setdefault((record.arm, record.mode), {})
        if record.seed in seeds:
            earlier = seeds[record.seed].run.path
            repeated.append(f"{earlier}: seed {record.seed} of {record.arm} is there again, later: {run.run.path}")
        seeds[record.seed] = run
    names = [name for name, _ in by_arm]
    arms = [
        Arm(f"{name}, {mode}" if names.count(name) > 1 else name, mode, tuple(seeds[seed] for seed in sorted(seeds)))
        for (name, mode), seeds in by_arm.items()
    ]
    return sorted(arms, key=lambda arm: (arm.mode != PLAIN, -arm.spread.mean, arm.name)), repeated


def _group(key: tuple[str, str, str, str], arms: list[Arm]) -> Group:
    plains = [arm for arm in arms if arm.mode == PLAIN]
    plain = next((arm for arm in plains if arm.name == PLAIN), plains[0] if plains else None)
    others = [arm for arm in arms if arm is not plain]
    against = _compared([(arm, plain) for arm in others] if plain else [])
    pairs = _compared(list(itertools.combinations(others, 2)))
    return Group(*key, tuple(arms), plain.name if plain else None, against, pairs, tuple(_notes(arms, plain, plains)))


def _compared(pairs: Sequence[tuple[Arm, Arm]]) -> tuple[Comparison, ...]:
    found = [difference(one.points, other.points, margin=MARGIN) for one, other in pairs]
    corrected = _corrected([each.p for each in found])
    equivalent = _corrected([each.p_equivalent for each in found])
    return tuple(
        Comparison(one.name, other.name, each, p, same, judge(each, other.name, p, same))
        for (one, other), each, p, same in zip(pairs, found, corrected, equivalent, strict=True)
    )


def _corrected(p_values: Sequence[float | None]) -> list[float | None]:
    known = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(known) for p in p_values]


def _notes(arms: Sequence[Arm], plain: Arm | None, plains: Sequence[Arm]) -> Iterable[str]:
    if plain is None:
        yield (
            "There is no plain arm among these runs, so nothing says whether distillation helped: train one with "
            "--loss none."
        )
    elif len(plains) > 1:
        yield f"{len(plains)} arms are plain; the others are compared with {plain.name}."
    for arm in arms:
        others = set(plain.points) if plain else set()
        if plain and arm is not plain and set(arm.points) != others:
            yield _unequal(arm, plain)
    epochs = {str(run.run.record.settings.get("epochs", "unknown")) for arm in arms for run in arm.runs}
    if len(epochs) > 1:
        yield f"The runs were set to different numbers of epochs ({', '.join(sorted(epochs))})."
    machines = {run.run.record.machine for arm in arms for run in arm.runs}
    if len(machines) > 1:
        yield "The runs come from different machines or numbers of threads: their seconds and memory do not compare."
    if len({repr(sorted(run.run.record.versions.items())) for arm in arms for run in arm.runs}) > 1:
        yield "The runs come from different versions of the libraries."


def _unequal(arm: Arm, plain: Arm) -> str:
    common = sorted(set(arm.points) & set(plain.points))
    head = f"Seeds of {arm.name}: {_listed(arm.points)}; of {plain.name}: {_listed(plain.points)}"
    if len(common) > 1:
        return f"{head}. Their difference is paired over {_listed(common)} only, the means are over all."
    return f"{head}. Fewer than two are common, so their difference is not paired."


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in sorted(seeds))
