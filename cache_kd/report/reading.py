"""In: records, run folders, folders of such. Out: the runs in them, each once, and one line for each that is none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_kd.errors import CacheKDError, InputDataError, MissingFileError
from cache_kd.report.record import FILE, STATE, RunRecord
from cache_kd.report.run_folder import CacheFacts, is_run_folder, read_run_folder

# What two runs of one arm may differ in: the seed, where they run and what they leave besides.
FREE_SETTINGS = frozenset(
    ("seed", "name", "project", "save_dir", "exist_ok", "verbose", "plots", "workers", "cache", "device", "save",
     "save_period", "resume", "model", "data", "val", "split", "save_json", "mode", "task", "show")
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run and where it was found; `path` is its record or its folder."""

    path: Path
    record: RunRecord


@dataclass(frozen=True)
class Runs:
    """All runs, and one line for each folder or record that was found and left out."""

    runs: tuple[Run, ...]
    faults: tuple[str, ...]


def read_runs(paths: Iterable[Path], cache_facts: CacheFacts) -> Runs:
    """Return the runs at `paths`; what is found inside a folder and cannot be read is left out and said.

    Raises:
        MissingFileError: A path is not there.
        InputDataError: A path that names one run is none, or nothing at all is a run.
    """
    paths = list(paths)
    found: dict[Path, Run] = {}
    faults: list[str] = []
    for path in paths:
        if not path.exists():
            raise MissingFileError(
                f"no such file or folder: {path}; allowed: a {FILE}, the folder of a run, or a folder of runs"
            )
        for place in _places(path):
            try:
                record = RunRecord.read(place) if place.is_file() else _from_folder(place, cache_facts)
            except CacheKDError as error:
                if _names_one_run(path):
                    raise
                faults.append(" ".join(str(error).split()))
                continue
            found[place.resolve()] = Run(place, record)
    if not found:
        why = f": {'; '.join(faults)}" if faults else f", no {FILE} and no results.csv beside an args.yaml"
        raise InputDataError(f"no run in {', '.join(map(str, paths))}{why}; make one: cache-kd train")
    return Runs(tuple(_apart(list(found.values()))), tuple(faults))


def _from_folder(folder: Path, cache_facts: CacheFacts) -> RunRecord:
    if (folder / STATE).is_file():
        raise InputDataError(f"{folder}: a recipe's run that is not finished; go on with it: cache-kd run RECIPE")
    return read_run_folder(folder, cache_facts)


def _names_one_run(path: Path) -> bool:
    return path.is_file() or (path / FILE).is_file() or is_run_folder(path)


def _places(path: Path) -> Iterator[Path]:
    """Yield the record or the run folder at every place below `path`, in order of their names."""
    if path.is_file():
        yield path
        return
    for folder, below, files in os.walk(path):
        below.sort()
        here = Path(folder)
        if FILE in files:
            yield here / FILE
        elif is_run_folder(here):
            yield here
        else:
            continue
        below.clear()  # what lies inside a run's folder is the run's


def _apart(runs: list[Run]) -> list[Run]:
    """Give runs read from their folders arms that differ where their cache or their settings do."""
    arms: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.record.recipe is None:
            arms.setdefault((run.record.arm, run.record.student), []).append(run)
    named = {id(run): name for group in arms.values() for run, name in zip(group, _names(group), strict=True)}
    return [replace(run, record=replace(run.record, arm=named.get(id(run), run.record.arm))) for run in runs]


def _names(runs: list[Run]) -> list[str]:
    caches = {run.record.cache.digest for run in runs if run.record.cache}
    differing = [key for key in _settings(runs) if len({repr(run.record.settings.get(key)) for run in runs}) > 1]
    names = []
    for run in runs:
        parts = [f"{key}={run.record.settings.get(key)}" for key in differing]
        if len(caches) > 1 and run.record.cache:
            parts.insert(0, Path(run.record.cache.path).name)
        names.append(f"{run.record.arm} ({', '.join(parts)})" if parts else run.record.arm)
    return names


def _settings(runs: list[Run]) -> list[str]:
    keys: dict[str, Any] = {}
    for run in runs:
        keys.update(dict.fromkeys(run.record.settings))
    return [key for key in keys if key not in FREE_SETTINGS]
