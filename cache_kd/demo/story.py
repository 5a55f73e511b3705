"""In: a folder and a seed. Out: a teacher, one cache, a plain and two distilled students, a table, a plot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_kd.cache.store import Place
from cache_kd.demo.scenes import CLASSES, draw_dataset
from cache_kd.demo.schedule import SCHEDULE
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.extraction import Extracted, extract
from cache_kd.pipeline.sizes import megabytes
from cache_kd.pipeline.train_settings import TrainSettings
from cache_kd.pipeline.training import train
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.ultralytics_bridge.baseline import train_stock

MAP, MAP50 = "metrics/mAP50-95(B)", "metrics/mAP50(B)"


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, its validation mAP, the seconds it took, the teacher's forward passes it used."""

    name: str
    map50_95: float | None
    map50: float | None
    seconds: float
    bytes: int
    teacher_forwards: int
    forwards_saved: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, good or bad."""

    rows: tuple[Row, ...]
    seconds: float
    folder: Path

    def to_json(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "seconds": self.seconds, "folder": str(self.folder)}

    def table(self) -> str:
        """Return the table as Markdown with a sentence that its numbers support."""
        head = "| model | mAP50-95 | mAP50 | seconds | bytes | teacher forwards | forwards saved |\n" + "|---" * 7 + "|"
        lines = [
            f"| {row.name} | {_share(row.map50_95)} | {_share(row.map50)} | {row.seconds:.1f} | "
            f"{megabytes(row.bytes) if row.bytes else '-'} | {row.teacher_forwards} | {row.forwards_saved or '-'} |"
            for row in self.rows
        ]
        return "\n".join([head, *lines, "", self.verdict(), f"{self.seconds:.0f} s in all; written to {self.folder}"])

    def verdict(self) -> str:
        """Return what one seed shows, without claiming more."""
        points = {row.name: 100 * row.map50_95 for row in self.rows if row.map50_95 is not None}
        plain, gap = points["plain"], points["teacher"] - points["plain"]
        gains = ", ".join(f"{name} {p - plain:+.1f}" for name, p in points.items() if name not in ("teacher", "plain"))
        return (
            f"The teacher is {gap:+.1f} points from the plain student. "
            f"Against plain, same seed and views: {gains} points. "
            "One seed is an anecdote, not a result."
        )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def tell(out: Path, *, seed: int, say: Callable[[str], None]) -> DemoResult:
    """Run the whole story below `out` and write table.md, result.json and plot.png there.

    Args:
        seed: Seed of the drawn set, of the views and of every training.
    """
    started = time.perf_counter()
    out = out.resolve()
    data = draw_dataset(
        out / "data", images=SCHEDULE.images, val_images=SCHEDULE.val_images, imgsz=SCHEDULE.imgsz, seed=seed
    )
    say(f"drew {SCHEDULE.images} training and {SCHEDULE.val_images} validation images of {len(CLASSES)} classes")
    teacher, checkpoint = _teacher(out, data, seed)
    say(f"teacher {SCHEDULE.teacher}: mAP50-95 {teacher.map50_95:.3f} after {teacher.seconds:.0f} s")
    before = time.perf_counter()
    made = extract(_extraction(out, checkpoint, data, seed), say=say)
    cache = _cache_row(made, time.perf_counter() - before)
    say(f"cache: {megabytes(made.num_bytes)}, {made.items} teacher forwards in {cache.seconds:.0f} s")
    rows = [teacher, cache]
    for name, losses in (("plain", ("none",)), *SCHEDULE.distilled):
        rows.append(_student(out, made.path, name, losses, seed))
        say(f"student {SCHEDULE.student}, {name}: mAP50-95 {rows[-1].map50_95:.3f} after {rows[-1].seconds:.0f} s")
    result = DemoResult(tuple(rows), time.perf_counter() - started, out)
    (out / "table.md").write_text(result.table() + "\n", encoding="utf-8")
    (out / "result.json").write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    _plot(result, out / "plot.png")
    return result


def _teacher(out: Path, data: Path, seed: int) -> tuple[Row, Path]:
    before = time.perf_counter()
    settings = {
        **SCHEDULE.training,
        **SCHEDULE.augmentation,
        "close_mosaic": SCHEDULE.close_mosaic,
        "model": SCHEDULE.teacher,
        "data": str(data),
        "imgsz": SCHEDULE.imgsz,
        "epochs": SCHEDULE.teacher_epochs,
        "seed": seed,
        "project": str(out),
        "name": "teacher",
        "exist_ok": True,
    }
    done = train_stock(settings, threads=cpu_threads())
    row = Row("teacher", done.metrics[MAP], done.metrics[MAP50], time.perf_counter() - before, 0, 0, 0)
    return row, done.folder / "weights" / "best.pt"


def _extraction(out: Path, checkpoint: Path, data: Path, seed: int) -> ExtractSettings:
    return ExtractSettings(
        teacher=checkpoint,
        data=data,
        cache=out / f"cache-{int(time.time())}",
        views=SCHEDULE.views,
        plain_views=SCHEDULE.plain_views,
        seed=seed,
        augment=SCHEDULE.augmentation,
    )


def _cache_row(made: Extracted, seconds: float) -> Row:
    return Row("cache", None, None, seconds, made.num_bytes, made.items, 0)


def _student(out: Path, cache: Place, name: str, losses: tuple[str, ...], seed: int) -> Row:
    before = time.perf_counter()
    settings = {
        **SCHEDULE.training,
        "epochs": SCHEDULE.student_epochs,
        "close_mosaic": SCHEDULE.close_mosaic,
        "seed": seed,
        "project": str(out),
        "exist_ok": True,
    }
    done = train(
        TrainSettings(
            SCHEDULE.student, cache=cache, losses=losses, name=name, threads=cpu_threads(), settings=settings
        ),
        say=lambda _: None,
    )
    live = 0 if losses == ("none",) else SCHEDULE.student_epochs * SCHEDULE.images
    return Row(name, done.metrics[MAP], done.metrics[MAP50], time.perf_counter() - before, 0, 0, live)


def _plot(result: DemoResult, file: Path) -> None:
    """Draw mAP50-95 of every model as horizontal bars."""
    from matplotlib.figure import Figure

    points = {row.name: row.map50_95 for row in result.rows[::-1] if row.map50_95 is not None}
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot()
    # Okabe-Ito colours, told apart with any colour vision.
    colours = {"teacher": "#999999", "plain": "#E69F00"}
    bars = axes.barh(list(points), list(points.values()), color=[colours.get(name, "#0072B2") for name in points])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_xlabel("mAP50-95 on the validation images (one seed)")
    axes.set_xlim(0, max(points.values()) * 1.15 + 0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120, facecolor="white")
