"""In: findings. Out: the report's sections, summary first: sentences, tables and plots, each number as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from cache_kd.report import wording
from cache_kd.report.blocks import NOTHING, Block, Items, Plot, Plots, Section, Table, Text
from cache_kd.report.comparison import Comparison, Group
from cache_kd.report.findings import Findings, GroupFindings, headline
from cache_kd.report.origins import origins
from cache_kd.report.progress_curves import ArmCurves, Series
from cache_kd.report.svg_plots import ARM_COLOURS, Interval, Line, interval_plot, line_plot
from cache_kd.report.verdict import KINDS, MARGIN

TOGETHER = len(ARM_COLOURS) - 1
"""Arms beside plain in one plot: as many as the palette tells apart."""
METHOD = (
    "Points are mAP50-95 × 100. ± is the standard deviation over seeds (n - 1). The interval is the 95 % interval of "
    "Student's t, of the differences of equal seeds where seeds match, else Welch's; it is not corrected for the "
    "number of arms, the p-values are (Holm). Equivalence is tested by two one-sided tests with a margin of one point."
)


def contents(findings: Findings) -> tuple[Section, ...]:
    """Return the sections of the report."""
    sections: list[Section] = []
    for number, found in enumerate(findings.groups):
        sections += _group_sections(found, number, alone=len(findings.groups) == 1)
    if not sections:
        sections.append(Section("Verdict", (Text("No run has a score, so there is nothing to compare."),)))
    sections += origins(findings)
    lines = (*findings.faults, *findings.warnings)
    told = Items(lines, warning=True) if lines else Text("None.")
    return (*sections, Section("Left out, and warnings of the runs", (told,)))


def _group_sections(found: GroupFindings, number: int, *, alone: bool) -> Iterator[Section]:
    name, of = f"g{number}", "" if alone else f" {number + 1}: {found.group.title}"
    yield Section(f"Verdict{of}", tuple(_summary(found, name)))
    if shown := tuple(_progress(found, name)):
        yield Section(f"Equal epochs and equal time{of}", shown)
    yield Section(f"Cost{of}", (_cost_table(found), Text(COST)))
    if shown := tuple(_terms(found, name)):
        yield Section(f"Loss terms and gradient shares{of}", shown)


def _summary(found: GroupFindings, name: str) -> Iterator[Block]:
    group = found.group
    yield Text(headline(found), lead=True)
    if group.against:
        texts = tuple(one.verdict.text for one in group.against)
        yield Items(texts, leads=tuple(one.arm for one in group.against))
    yield _arm_table(group)
    if group.against:
        rows = [
            Interval(one.arm, _style(at), one.difference.mean, one.difference.interval, one.difference.each)
            for at, one in enumerate(group.against)
        ]
        svg = interval_plot(f"{name}-diff", rows, margin=MARGIN, x=f"difference to {group.plain} in points of mAP50-95")
        words = "; ".join(f"{one.arm} {_in_words(one)}" for one in group.against)
        note = "Bars: 95 % intervals. Small dots: the difference of each seed. Grey band: ± one point."
        yield Plots((Plot(svg, f"Difference to {group.plain}", f"{words}.", note),))
    if found.notes:
        yield Items(found.notes, warning=True)
    yield Text(METHOD)
    if group.pairs:
        yield Section("Every pair of the other arms", (_pair_table(group),), folded=True)
    if any(arm.per_class for arm in group.arms):
        yield Section("By class", (_class_table(group),), folded=True)


def _in_words(one: Comparison) -> str:
    found = one.difference
    inside = "" if found.interval is None else f", interval {wording.interval(found.interval)}"
    return f"{wording.change(found.mean)}{inside}"


def _style(at: int) -> int:
    return 1 + at % TOGETHER


def _arm_table(group: Group) -> Table:
    against = {one.arm: one for one in group.against}
    rows = []
    for arm in group.arms:
        spread, one = arm.spread, against.get(arm.name)
        fifty = arm.spread50
        rows.append(
            (
                arm.name,
                KINDS[one.verdict.kind] if one else "baseline" if group.against else NOTHING,
                wording.mean_and_sd(spread),
                *(_tested(one) if one else (NOTHING,) * 4),
                wording.seeds(list(arm.points)),
                f"{wording.points(spread.low)} to {wording.points(spread.high)}",
                wording.points(fifty.mean if fifty else None),
            )
        )
    head = (
        "arm", "verdict", "mAP50-95, mean ± sd", "difference to plain", "95 % interval", "p (Holm)",
        "p of equivalence (Holm)", "seeds", "range", "mAP50, mean",
    )  # fmt: skip
    return Table(f"{group.title}, in points", head, tuple(rows))


def _tested(one: Comparison) -> tuple[str, str, str, str]:
    found = one.difference
    return (
        wording.change(found.mean),
        wording.interval(found.interval),
        wording.probability(one.p),
        wording.probability(one.p_equivalent),
    )


def _pair_table(group: Group) -> Table:
    rows = tuple((one.arm, one.other, *_tested(one), KINDS[one.verdict.kind]) for one in group.pairs)
    head = ("arm", "compared with", "difference", "95 % interval", "p (Holm)", "p of equivalence (Holm)", "verdict")
    return Table("Pairs, in points of mAP50-95; Holm's correction is for all of them", head, rows)


def _class_table(group: Group) -> Table:
    names = tuple(dict.fromkeys(name for arm in group.arms for name in arm.per_class))
    rows = tuple((arm.name, *(wording.points(arm.per_class.get(name)) for name in names)) for arm in group.arms)
    return Table("mAP50-95 by class, mean over seeds, in points", ("arm", *names), rows)


def _progress(found: GroupFindings, name: str) -> Iterator[Block]:
    drawn = [curve for curve in found.curves if curve.score is not None]
    if not drawn:
        yield Text(
            "These runs were not validated while they trained (val=False), so there are no curves of mAP by epoch and "
            "by time; train with val=True to have them."
        )
        return
    plots = []
    parts = list(_parts(drawn, found.group.plain))
    for part, curves in enumerate(parts):
        legend = tuple((style, curve.arm) for style, curve in curves)
        for axis, title, x in (
            ("epochs", "Equal epochs", "epoch"),
            ("time", "Equal time", "seconds since the start, with the share of the extraction"),
        ):
            lines = [_line(style, curve, by_time=axis == "time") for style, curve in curves]
            svg = line_plot(f"{name}-{axis}{part}", lines, x=x, y="validation mAP50-95 in points")
            words = "; ".join(f"{line.label} ends with {line.y[-1]:.1f} points at {line.x[-1]:.0f}" for line in lines)
            of = f", {part + 1} of {len(parts)}" if len(parts) > 1 else ""
            note = "Mean over seeds; bands: smallest to largest."
            plots.append(Plot(svg, f"{title}{of}", f"{words}.", note, legend))
    yield Plots(tuple(plots))
    budget = found.budget
    if budget is not None:
        rows = tuple(
            (arm, wording.points(value), wording.points(budget.at_seconds[arm]))
            for arm, value in budget.at_epoch.items()
        )
        head = ("arm", f"at epoch {budget.epoch}", f"at {wording.seconds(budget.seconds)} s")
        yield Table("Validation mAP50-95 in points, mean over seeds", head, rows)
        yield Text(
            "The second column stops every arm when the first of them had finished. A run that is cut short has not "
            "lowered its learning rate yet, so its figure there is a lower bound of what that time could give."
        )


def _parts(drawn: Sequence[ArmCurves], plain: str | None) -> Iterator[list[tuple[int, ArmCurves]]]:
    """Yield the curves of each plot with their places in the palette: plain in all, of the others a handful each."""
    base = [(0, curve) for curve in drawn if curve.arm == plain]
    others = [curve for curve in drawn if curve.arm != plain]
    for start in range(0, max(len(others), 1), TOGETHER):
        yield base + [(_style(at), curve) for at, curve in enumerate(others[start : start + TOGETHER])]


def _line(style: int, curve: ArmCurves, *, by_time: bool) -> Line:
    series = curve.score
    assert series is not None  # only such curves are drawn
    return _series_line(curve.arm, style, series, curve.seconds if by_time else None)


def _series_line(label: str, style: int, series: Series, x: tuple[float, ...] | None = None) -> Line:
    band = (series.low, series.high) if series.low != series.high else ((), ())
    return Line(label, style, x or tuple(map(float, series.epochs)), series.mean, *band)


COST = (
    "The extraction is paid once: its seconds are shared equally by the runs of this report that train from the cache. "
    "Teacher images: how many images went through the teacher, in one run, and once for the whole cache."
)


def _cost_table(found: GroupFindings) -> Table:
    rows = tuple(
        (
            cost.arm,
            str(cost.runs),
            wording.seconds(cost.seconds),
            wording.seconds(cost.share_seconds),
            wording.seconds(cost.total_seconds),
            wording.count(cost.teacher_forwards),
            wording.count(cost.cache_forwards),
            wording.size(cost.cache_bytes),
            wording.size(cost.bytes_per_view),
            wording.size(cost.bytes_read),
            wording.size(cost.peak_memory_bytes),
            wording.size(cost.device_memory_bytes),
        )
        for cost in found.costs
    )
    head = (
        "arm", "runs", "seconds a run", "its share of the extraction, s", "together, s", "teacher images in a run",
        "teacher images for the cache, once", "cache", "a view", "read in a run", "memory, largest",
        "GPU memory, largest",
    )  # fmt: skip
    return Table("Cost, mean over the runs", head, rows)


def _terms(found: GroupFindings, name: str) -> Iterator[Block]:
    rows = [row for curve in found.curves for row in _term_rows(curve)]
    if rows:
        head = ("arm", "term", "first epoch", "last epoch", "share of the gradient, median", "smallest to largest")
        yield Table(
            "Distillation's terms as they enter the loss, and their share on the student's neck", head, tuple(rows)
        )
    plots = [plot for at, curve in enumerate(found.curves) for plot in _term_plots(curve, f"{name}-terms{at}")]
    if plots:
        yield Section("Plots of every arm", (Plots(tuple(plots)),), folded=len(plots) > 8)


def _term_rows(curve: ArmCurves) -> Iterator[tuple[str, ...]]:
    for term, series in curve.terms.items():
        share = curve.shares.get(term)
        middle = wording.percent(statistics.median(share.mean)) if share else NOTHING
        ends = f"{wording.percent(min(share.low))} to {wording.percent(max(share.high))}" if share else NOTHING
        yield curve.arm, term, wording.figure(series.mean[0]), wording.figure(series.mean[-1]), middle, ends


def _term_plots(curve: ArmCurves, name: str) -> Iterator[Plot]:
    losses = {**curve.own, **curve.terms}
    for kind, found, y, limits in (
        ("loss", losses, "loss, as it enters the sum", ()),
        ("share", curve.shares, "share of the gradient on the neck", (0.01, 0.9)),
    ):
        names = list(found)[: TOGETHER + 1]
        if not names:
            continue
        lines = [_series_line(term, at, found[term]) for at, term in enumerate(names)]
        svg = line_plot(f"{name}-{kind}", lines, x="epoch", y=y, log=kind == "loss", limits=limits)
        words = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
        title = f"{curve.arm}: {'losses' if kind == 'loss' else 'gradient shares'}"
        note = "Mean over seeds." + (" Dotted: 1 % and 90 %, where the alarms are." if limits else "")
        yield Plot(svg, title, f"{words}.", note, tuple(enumerate(names)))
