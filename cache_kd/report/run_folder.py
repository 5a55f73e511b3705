"""In: the folder that `cache-kd train` or Ultralytics left. Out: the record of that run, as far as its files tell."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cache_kd.config import read_yaml
from cache_kd.errors import CacheKDError, InputDataError, MissingFileError
from cache_kd.report.record import CacheRecord, CostRecord, EpochRecord, MachineRecord, RunRecord

RESULTS, SETTINGS, DISTILLED, GRADIENTS = "results.csv", "args.yaml", "cache_kd.yaml", "kd_gradients.csv"
NO_LOSSES = "none"

CacheFacts = Callable[[Path], CacheRecord]
"""What tells the facts of a cache that is still where the run found it."""


def is_run_folder(folder: Path) -> bool:
    """Return whether Ultralytics trained into this folder."""
    return (folder / RESULTS).is_file() and (folder / SETTINGS).is_file()


def read_run_folder(folder: Path, cache_facts: CacheFacts) -> RunRecord:
    """Return the record of a run, made from the files in its folder; nobody judged its finished weights.

    Raises:
        CacheKDError: A file is missing or is not what Ultralytics or cache-kd writes.
    """
    settings = read_yaml(folder / SETTINGS)
    own = read_yaml(folder / DISTILLED) if (folder / DISTILLED).is_file() else {}
    losses = tuple(text for text in _texts(own.get("losses"), folder / DISTILLED) if text != NO_LOSSES)
    epochs = read_epochs(folder)
    cache, warnings = _cache(own, cache_facts) if losses else (None, [])
    teacher = own.get("teacher", {}).get("file") if losses else settings.get("distill_model")
    if settings.get("distill_model"):
        warnings.append("an online run of Ultralytics: how many images went through its teacher is not recorded")
    mode = "cached" if losses else "online" if settings.get("distill_model") else "plain"
    return RunRecord(
        recipe=None,
        study="",
        arm=", ".join(losses) or ("online, Ultralytics' own" if mode == "online" else "plain"),
        mode=mode,
        seed=_seed(settings, folder),
        student=Path(str(own.get("student") or settings.get("model") or "unknown")).name,
        teacher=Path(str(teacher)).name if teacher else None,
        data=Path(str(settings.get("data") or "unknown")).name,
        split="val",
        losses=losses,
        cache=cache,
        settings={key: value for key, value in settings.items() if _plain(value)},
        fingerprint="",
        versions={},
        machine=MachineRecord("not recorded", 0, None, None),
        started=datetime.fromtimestamp((folder / SETTINGS).stat().st_mtime, UTC).isoformat(timespec="seconds"),
        cost=CostRecord(epochs[-1].seconds, 0, None, None, None),
        epochs=epochs,
        judged=None,
        warnings=tuple(warnings),
    )


def _texts(value: Any, path: Path) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputDataError(f"{path}: losses is not a list of texts; train the run again")
    return value


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _seed(settings: Mapping[str, Any], folder: Path) -> int:
    seed = settings.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputDataError(f"{folder / SETTINGS}: seed is {seed!r}; allowed: a whole number")
    return seed


def _cache(own: Mapping[str, Any], cache_facts: CacheFacts) -> tuple[CacheRecord | None, list[str]]:
    """Return what is known of the cache that a run read, from the cache itself where it is still there."""
    path, views = Path(str(own.get("cache"))), [str(view) for view in own.get("views") or []]
    plain = sum(view.startswith("plain") for view in views)
    try:
        found = cache_facts(path)
        if found.digest == own.get("digest"):
            return found, []
        why = "another one is there now"
    except CacheKDError:
        why = "it is not there"
    # What the run wrote down suffices to tell caches apart; sizes and seconds stay unknown.
    told = CacheRecord(
        path=str(path),
        digest=str(own.get("digest") or own.get("identity") or ""),
        fidelity="unknown",
        views=len(views) - plain,
        plain_views=plain,
        pack=None if own.get("pack") in (None, "none") else str(own["pack"]),
        seed=0,
        bytes=None,
        extract_seconds=None,
        bytes_per_view=None,
        teacher_forwards=None,
    )
    return told, [f"cache {path}: {why}, so its size and the extraction's seconds are unknown"]


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {str(key).strip(): str(value).strip() for key, value in row.items()}
                for row in csv.DictReader(file, strict=True)
            ]
    except FileNotFoundError:
        raise MissingFileError(f"no such file: {path}; a run leaves one after its first epoch") from None
    except (csv.Error, ValueError) as error:
        raise InputDataError(f"{path} is not a table of comma-separated values: {error}") from None


def _number(text: str, path: Path, column: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputDataError(f"{path}: {column} is {text!r}; allowed: a number") from None


def read_epochs(folder: Path) -> tuple[EpochRecord, ...]:
    """Return what a run's tables say of each epoch; the clock of a resumed run goes on where it stood.

    Raises:
        MissingFileError, InputDataError: A table is missing or is not what a training writes.
    """
    path = folder / RESULTS
    rows, shares = _rows(path), _shares(folder / GRADIENTS)
    if not rows:
        raise InputDataError(f"{path} holds no epoch; train on: cache-kd train resume={folder / 'weights' / 'last.pt'}")
    if missing := [name for name in ("epoch", "time") if name not in rows[0]]:
        raise InputDataError(f"{path} has no column {' and no column '.join(missing)}")
    epochs: list[EpochRecord] = []
    before = last = 0.0  # every part of a run that was resumed counts its seconds from its own start
    for row in rows:
        values = {name: _number(text, path, name) for name, text in row.items()}
        number, seconds = int(values.pop("epoch")), values.pop("time")
        if seconds < last:
            before += last
        last = seconds
        metrics = {name: value if math.isfinite(value) else None for name, value in values.items()}
        epochs.append(EpochRecord(number, before + seconds, metrics, shares.get(number, {})))
    return tuple(epochs)


def _shares(path: Path) -> dict[int, dict[str, float | None]]:
    """Return the share of the gradient by epoch and term; a run without distillation has none."""
    found: dict[int, dict[str, float | None]] = {}
    for row in _rows(path) if path.is_file() else []:
        if not {"epoch", "term", "share"} <= set(row):
            raise InputDataError(f"{path} has the columns {', '.join(row)}; allowed: epoch, term, share, weight")
        share = _number(row["share"], path, "share")
        epoch = int(_number(row["epoch"], path, "epoch"))
        found.setdefault(epoch, {})[row["term"]] = share if math.isfinite(share) else None
    return found
