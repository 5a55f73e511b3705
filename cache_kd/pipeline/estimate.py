"""In: the settings of an extraction. Out: what it would cost, beside neighbouring fidelities and numbers of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cache_kd.cache.disk import free_bytes, write_rate
from cache_kd.cache.store import Place
from cache_kd.codecs import FIDELITIES, ViewCodec
from cache_kd.pipeline.default_losses import arrays_read, default_losses
from cache_kd.pipeline.extract_settings import DEFAULT_FIDELITY, ExtractSettings
from cache_kd.pipeline.forecast import Forecast, forecast
from cache_kd.pipeline.preparation import Plan, budget_fidelities, make_plan, within_budget
from cache_kd.pipeline.probe import ITEMS, MOST_ITEMS, Probed, torch_threads
from cache_kd.pipeline.sizes import duration, megabytes
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.ultralytics_bridge.plain_step import STUDENT, plain_step_rate

STEP_VIEWS = 8


@dataclass(frozen=True)
class Row:
    """One line of the table: an extraction that could be made, and what it costs; `chosen`: the one asked about."""

    fidelity: str
    views: int
    plain_views: int
    chosen: bool
    figures: Forecast
    error: float


@dataclass(frozen=True)
class Estimate:
    """What `cache-kd estimate` says.

    Attributes:
        rows: the chosen extraction and its neighbours. write_rate: bytes a second that the disk took. free: its bytes.
        step_rate: images a second of a plain training step of `STUDENT`, loading left out.
        reasons: why a budget led to this choice.
    """

    path: Place
    images: int
    imgsz: int
    losses: tuple[str, ...]
    probed: Probed
    write_rate: float
    free: int | None
    step_rate: float
    rows: tuple[Row, ...]
    reasons: tuple[str, ...] = ()

    @property
    def chosen(self) -> Row:
        return next(row for row in self.rows if row.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return all figures: bytes, seconds, bytes a second, images a second."""
        rows = []
        for row in self.rows:
            figures = asdict(row.figures)
            figures["read_bytes_per_second"] = row.figures.read_bytes * self.step_rate
            names = ("fidelity", "views", "plain_views", "chosen", "error")
            rows.append({**{name: getattr(row, name) for name in names}, **figures})
        return {
            "cache": str(self.path),
            "images": self.images,
            "imgsz": self.imgsz,
            "items_probed": self.probed.items,
            "seconds_per_item": asdict(self.probed.seconds),
            "disk": {"write_bytes_per_second": self.write_rate, "free_bytes": self.free},
            "plain_step": {"student": STUDENT, "images_per_second": self.step_rate},
            "losses": list(self.losses),
            "reasons": list(self.reasons),
            "rows": rows,
        }

    def lines(self) -> list[str]:
        """Return the figures as lines and a table for people."""
        seconds, chosen = self.probed.seconds, self.chosen
        room = "no end to it" if self.free is None else f"{megabytes(self.free)} free"
        short = self.free is not None and chosen.figures.bytes > self.free
        return [
            *self.reasons,
            f"{self.path}: {self.images} images at {self.imgsz} px, {self.probed.items} items looked at",
            f"  an item   view {_ms(seconds.views)}, teacher {_ms(seconds.teacher)} (forward pass "
            f"{_ms(seconds.forward)}), coding {_ms(seconds.encode[chosen.fidelity])}",
            f"  disk      writes {megabytes(self.write_rate)}/s, {room}" + (", which is too little" if short else ""),
            f"  training  a plain step of {STUDENT} here makes {self.step_rate:.0f} images/s; reading is for "
            f"{', '.join(self.losses)} at that rate",
            "",
            *_table(self.rows, self.step_rate),
            "",
            f"bytes are within {200 * max(row.error for row in self.rows):.0f} % (two standard errors); break-even: "
            "epochs, of one student or several, whose live teacher costs as much time as the extraction",
        ]


def estimate(settings: ExtractSettings, *, say: Callable[[str], None]) -> Estimate:
    """Return what an extraction with these settings costs, and its neighbours, by a sample; nothing of it is kept.

    Raises:
        CacheKDError: One line about what is wrong, as for an extraction.
    """
    plan = make_plan(settings, say)
    fixed, reasons = plan.fixed_bytes(), tuple[str, ...]()
    asked = settings.fidelity or DEFAULT_FIDELITY
    plan.path(plan.codec(asked))  # an unknown fidelity, a folder inside the data set: before anything takes time
    names = budget_fidelities(settings) if settings.budget is not None else ()
    codecs = {name: plan.codec(name) for name in FIDELITIES if name in {*names, *_neighbours(asked)}}
    probed = plan.probe(codecs, settings.view_list, items=ITEMS, most=MOST_ITEMS)
    if settings.budget is not None:
        choice = within_budget(plan, settings.budget, probed, fixed)
        reasons, asked = choice.reason, choice.fidelity
        settings = replace(settings, fidelity=asked, views=choice.views)
    path = plan.path(codecs[asked])
    rate = write_rate(path)
    counts = sorted({max(1, settings.views // 2), settings.views, settings.views * 2} if settings.views else {0})
    rows = tuple(
        _row(plan, probed, codecs[name], views, settings, rate, fixed, chosen=(name, views) == (asked, settings.views))
        for name in _neighbours(asked)
        if name in codecs
        for views in counts
    )
    device = str(plan.teacher.device)
    with torch_threads(cpu_threads()):
        step = plain_step_rate(probed.samples[:STEP_VIEWS], plan.teacher.head.num_classes, device=device)
    losses = default_losses(codecs[asked].store, plan.teacher.head)
    images, free = len(plan.dataset), free_bytes(path)
    return Estimate(path, images, plan.imgsz, losses, probed, rate, free, step, rows, reasons)


def _neighbours(fidelity: str) -> tuple[str, ...]:
    """Return the next finer preset, this one, the next coarser, as far as there are such."""
    names = list(FIDELITIES)
    at = names.index(fidelity) if fidelity in names else 0
    return tuple(names[max(0, at - 1) : at + 2])


def _row(
    plan: Plan,
    probed: Probed,
    codec: ViewCodec,
    views: int,
    settings: ExtractSettings,
    rate: float,
    fixed: int,
    *,
    chosen: bool,
) -> Row:
    name, counts = codec.fidelity.name, {"mixed": views, "plain": settings.plain_views}
    work = plan.workload(codec, counts, write_rate=rate, fixed_bytes=fixed)
    figures = forecast(probed, name, work, arrays_read(codec, plan.dataset.packing))
    return Row(name, views, settings.plain_views, chosen, figures, probed.error(name))


def _table(rows: Sequence[Row], rate: float) -> list[str]:
    titles = ("", "fidelity", "views", "bytes", "a view", "extraction", "read at", "break-even")
    cells = [titles]
    for row in rows:
        figures = row.figures
        cells.append(
            (
                "*" if row.chosen else "",
                row.fidelity,
                f"{row.views}+{row.plain_views}",
                megabytes(figures.bytes),
                megabytes(figures.bytes_per_view),
                duration(figures.seconds),
                f"{megabytes(figures.read_bytes * rate)}/s",
                "-" if figures.break_even is None else f"{figures.break_even:.1f} epochs",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    return [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
