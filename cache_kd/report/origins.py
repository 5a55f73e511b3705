"""In: findings. Out: sections on where the numbers come from: runs, settings, caches, versions, machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cache_kd.report import wording
from cache_kd.report.blocks import NOTHING, Section, Table, Text
from cache_kd.report.findings import Findings
from cache_kd.report.record import RunRecord
from cache_kd.report.scores import score

SHORT = 12


def origins(findings: Findings) -> Iterator[Section]:
    """Yield what identifies the runs and what they had in common."""
    yield Section("Runs", (_run_table(findings),), folded=len(findings.runs) > SHORT)
    if findings.caches:
        yield Section("Caches", (_cache_table(findings),))
    yield Section("Settings", tuple(_setting_tables(findings)), folded=True)
    yield Section("Versions and machines", (_machine_table(findings), _version_table(findings)), folded=True)


def _run_table(findings: Findings) -> Table:
    rows = []
    for run in findings.runs:
        record, found = run.record, score(run.record)
        rows.append(
            (
                record.arm,
                str(record.seed),
                record.mode,
                wording.points(found.points if found else None),
                str(len(record.epochs)),
                wording.seconds(record.cost.seconds),
                record.started.replace("T", " ")[:16],
                ", ".join(record.losses) or NOTHING,
                record.teacher or NOTHING,
                record.fingerprint[:SHORT] or NOTHING,
                str(run.path),
            )
        )
    head = (
        "arm", "seed", "mode", "mAP50-95 in points", "epochs", "seconds", "started", "losses", "teacher",
        "fingerprint", "found at",
    )  # fmt: skip
    return Table("Every run", head, tuple(rows))


def _cache_table(findings: Findings) -> Table:
    rows = tuple(
        (
            Path(use.cache.path).name,
            use.cache.digest[:SHORT],
            use.cache.fidelity,
            f"{use.cache.views} mixed, {use.cache.plain_views} plain",
            use.cache.pack or "none",
            str(use.cache.seed),
            wording.size(use.cache.bytes),
            wording.size(use.cache.bytes_per_view),
            wording.seconds(use.cache.extract_seconds),
            wording.count(use.cache.teacher_forwards),
            str(use.runs),
        )
        for use in findings.caches
    )
    head = (
        "cache", "digest", "fidelity", "views", "packed", "seed", "size", "a view", "extraction, s", "teacher images",
        "runs here",
    )  # fmt: skip
    return Table("Caches that the runs trained from", head, rows)


def _setting_tables(findings: Findings) -> Iterator[Table | Text]:
    records = [run.record for run in findings.runs]
    keys = list(dict.fromkeys(key for record in records for key in record.settings))
    common = [key for key in keys if len({repr(record.settings.get(key, NOTHING)) for record in records}) == 1]
    differing = [key for key in keys if key not in common]
    if common:
        rows = tuple((key, str(records[0].settings[key])) for key in common)
        yield Table("The same in every run", ("setting", "value"), rows)
    if differing:
        apart = tuple(
            (f"{record.arm}, seed {record.seed}", *(str(record.settings.get(key, NOTHING)) for key in differing))
            for record in records
        )
        yield Table("What differs", ("run", *differing), apart)
    if not keys:
        yield Text("The runs recorded none.")


def _machine_table(findings: Findings) -> Table:
    counted: dict[tuple[str, ...], int] = {}
    for run in findings.runs:
        machine = run.record.machine
        key = (machine.processor, str(machine.cores or NOTHING), str(machine.threads or NOTHING), machine.gpu or "none")
        counted[key] = counted.get(key, 0) + 1
    rows = tuple((*key, str(runs)) for key, runs in counted.items())
    return Table("Machines", ("processor", "cores", "threads", "GPU", "runs"), rows)


def _version_table(findings: Findings) -> Table:
    records: list[RunRecord] = [run.record for run in findings.runs]
    names = sorted({name for record in records for name in record.versions})
    rows = [(name, ", ".join(sorted({record.versions.get(name) or "absent" for record in records}))) for name in names]
    return Table("Versions", ("package", "version"), tuple(rows) or ((NOTHING, "not recorded"),))
