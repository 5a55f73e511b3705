"""In: findings. Out: report.html, report.md, report.csv and report.json in a folder, each written whole."""

from __future__ import annotations

import json
from pathlib import Path

from cache_kd import __version__
from cache_kd.cache.files import make_folder, write_atomic
from cache_kd.report.contents import contents
from cache_kd.report.findings import Findings, to_document
from cache_kd.report.markdown import markdown
from cache_kd.report.page import page
from cache_kd.report.run_table import run_table


def texts(findings: Findings) -> dict[str, str]:
    """Return the report's files: name and content. The same runs give the same bytes."""
    sections = contents(findings)
    subtitle, footer = _subtitle(findings), f"Made by cache-kd {__version__} report."
    return {
        "report.html": page(findings.title, subtitle, sections, footer),
        "report.md": markdown(findings.title, subtitle, sections, footer),
        "report.csv": run_table(findings.runs),
        "report.json": json.dumps(to_document(findings), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }


def write(findings: Findings, folder: Path) -> list[Path]:
    """Write the report into `folder`, which is made; returns the files, the page first."""
    made = texts(findings)
    make_folder(folder)
    for name, text in made.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in made]


def _subtitle(findings: Findings) -> list[str]:
    runs = findings.runs
    arms = len({(run.record.arm, run.record.mode) for run in runs})
    started = sorted(run.record.started[:10] for run in runs)
    days = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
    settings = "; ".join(dict.fromkeys(found.group.title for found in findings.groups))
    return [*findings.questions, f"{len(runs)} runs, {arms} arms, {days}.", *([f"{settings}."] if settings else [])]
