"""In: folders of runs. Out: what they tell, compared, as numbers or as the files of a report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cache_kd.report.findings import Findings, find
from cache_kd.report.reading import read_runs
from cache_kd.report.record import CacheRecord


def report(paths: Iterable[Path]) -> Findings:
    """Return what the runs at `paths` tell: records, run folders, or folders that hold such.

    Raises:
        CacheKDError: A path is not there, names one run that cannot be read, or there is no run at all.
    """
    return find(read_runs(paths, _cache_facts))


def _cache_facts(path: Path) -> CacheRecord:
    from cache_kd.pipeline.cache_record import cache_record  # loads torch and Ultralytics; records do without

    return cache_record(path)
