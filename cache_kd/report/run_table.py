"""In: runs. Out: one row of comma-separated values a run, numbers unrounded, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from cache_kd.report.reading import Run
from cache_kd.report.scores import score

COLUMNS = (
    "path", "recipe", "arm", "mode", "seed", "student", "teacher", "data", "imgsz", "epochs", "losses", "basis",
    "points", "points50", "seconds", "teacher_forwards", "bytes_read", "peak_memory_bytes", "device_memory_bytes",
    "cache", "cache_digest", "cache_fidelity", "cache_views", "cache_plain_views", "cache_seed", "cache_bytes",
    "cache_extract_seconds", "cache_teacher_forwards", "fingerprint", "started",
)  # fmt: skip


def run_table(runs: Sequence[Run]) -> str:
    """Return the table with its head; what is not known is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        writer.writerow(["" if value is None else value for value in _row(run)])
    return buffer.getvalue()


def _row(run: Run) -> list[object]:
    record, found, cache, cost = run.record, score(run.record), run.record.cache, run.record.cost
    told: list[object] = [
        run.path, record.recipe, record.arm, record.mode, record.seed, record.student, record.teacher, record.data,
        record.settings.get("imgsz"), len(record.epochs), " ".join(record.losses),
    ]  # fmt: skip
    told += [found.basis, found.points, found.points50] if found else [None] * 3
    told += [cost.seconds, cost.teacher_forwards, cost.bytes_read, cost.peak_memory_bytes, cost.device_memory_bytes]
    if cache is None:
        told += [None] * 9
    else:
        told += [cache.path, cache.digest, cache.fidelity, cache.views, cache.plain_views, cache.seed]
        told += [cache.bytes, cache.extract_seconds, cache.teacher_forwards]
    return [*told, record.fingerprint, record.started]
