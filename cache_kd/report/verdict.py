"""In: a difference with its tests. Out: what it supports, in words, and nothing beyond."""

from __future__ import annotations

from dataclasses import dataclass

from cache_kd.report.paired_statistics import Difference

ALPHA = 0.05
MARGIN = 1.0
"""Points; differences inside ± this count as equivalent."""
FEW = 3
KINDS = {
    "better": "better",
    "worse": "worse",
    "equivalent": "equivalent within one point",
    "undecided": "no difference beyond seed noise",
    "one seed": "one seed says nothing about noise",
}


@dataclass(frozen=True)
class Verdict:
    """`kind` is one of `KINDS`; `text` a sentence with the numbers that it rests on."""

    kind: str
    text: str


def signed(points: float) -> str:
    """Return points as every table and sentence shows a difference."""
    return f"{round(points, 2) + 0.0:+.2f}"  # + 0.0: no minus before a zero


def p_text(p: float) -> str:
    """Return a p-value as every table and sentence shows it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def judge(found: Difference, other: str, p: float | None, p_equivalent: float | None) -> Verdict:
    """Return the verdict on an arm's difference to `other`, by p-values that are already corrected for their number."""
    amount = f"{signed(found.mean)} points"
    if found.interval is None or p is None or p_equivalent is None:
        return Verdict("one seed", f"{amount} to {other}, but {KINDS['one seed']}: run more seeds.")
    low, high = found.interval
    ground = f"{amount}, 95 % interval {signed(low)} to {signed(high)}, p {_equals(p)}, {_count(found)}"
    few = f" With {found.n} seeds only, this is a hint." if found.n < FEW else ""
    within = f", equivalent within one point (p {_equals(p_equivalent)})" if p_equivalent < ALPHA else ""
    if p < ALPHA:
        kind = "better" if found.mean > 0 else "worse"
        small = f"; yet the difference is smaller than one point (p {_equals(p_equivalent)})" if within else ""
        return Verdict(kind, f"{kind.capitalize()} than {other}: {ground}{small}.{few}")
    if within:
        return Verdict("equivalent", f"No difference to {other} beyond seed noise{within}: {ground}.{few}")
    missing = f"; equivalence within one point is not shown either (p {_equals(p_equivalent)})"
    return Verdict("undecided", f"No difference to {other} beyond seed noise: {ground}{missing}.{few}")


def _equals(p: float) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _count(found: Difference) -> str:
    return f"{found.n} paired seeds" if found.test == "paired" else f"unpaired, {found.n} or more seeds each"
