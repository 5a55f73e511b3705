"""In: what one run was and did. Out: record.json in the run's folder, written whole, and read back checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from cache_kd.cache.files import write_atomic
from cache_kd.errors import InputDataError, MissingFileError
from cache_kd.report.json_fields import KEY, FieldFault, from_json, short, to_json

FILE = "record.json"
STATE = "state.json"
"""In the folder of a recipe's run until it has its record."""
VERSION = 1
MODES = ("plain", "online", "cotrained", "cached")


@dataclass(frozen=True)
class CacheRecord:
    """The cache that a run read.

    Attributes:
        bytes: of all its files. bytes_per_view: of one view of one image.
        extract_seconds: wall time of the extraction; None where nobody recorded it.
        teacher_forwards: images that went through the teacher to make it; paid once, however many runs read it.
    """

    path: str
    digest: str
    fidelity: str
    views: int
    plain_views: int
    pack: str | None
    seed: int
    bytes: int | None
    extract_seconds: float | None
    bytes_per_view: float | None
    teacher_forwards: int | None


@dataclass(frozen=True)
class MachineRecord:
    """What a run ran on; `threads` are torch's."""

    processor: str
    cores: int
    gpu: str | None
    threads: int | None


@dataclass(frozen=True)
class CostRecord:
    """What a run itself took, without the extraction.

    Attributes:
        seconds: wall time of the whole run, its validation included.
        teacher_forwards: images that went through the teacher in this run: 0 unless it is online.
        peak_memory_bytes: highest resident memory of the process. device_memory_bytes: highest allocated on the GPU.
        bytes_read: from the cache.
    """

    seconds: float | None
    teacher_forwards: int
    peak_memory_bytes: int | None
    device_memory_bytes: int | None
    bytes_read: int | None


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: from 1. seconds: since the start of training, this epoch included.
        metrics: the row of results.csv; None where the value was not finite.
        shares: share of the gradient on the student's neck by loss term, 0 to 1; empty where not measured.
    """

    epoch: int
    seconds: float
    metrics: Mapping[str, float | None]
    shares: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """Metrics of the finished weights on a split, 0 to 1; `weights` says which file, as "last"."""

    weights: str
    split: str
    map50_95: float = field(metadata={KEY: "mAP50-95"})
    map50: float = field(metadata={KEY: "mAP50"})
    per_class: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """Everything about one run that a report or a resumed recipe needs.

    Attributes:
        recipe: name of the recipe; None for a run of `cache-kd train`. study: the question that the recipe asks.
        arm: what is compared; runs of one arm differ by their seed only. mode: one of `MODES`.
        losses: canonical specs. settings: those of Ultralytics. fingerprint: of everything that decides the result.
        started: ISO 8601 with its offset. judged: None where nobody judged the finished weights.
    """

    recipe: str | None
    study: str
    arm: str
    mode: str
    seed: int
    student: str
    teacher: str | None
    data: str
    split: str
    losses: tuple[str, ...]
    cache: CacheRecord | None
    settings: Mapping[str, Any]
    fingerprint: str
    versions: Mapping[str, str | None]
    machine: MachineRecord
    started: str
    cost: CostRecord
    epochs: tuple[EpochRecord, ...]
    judged: Judgement | None
    warnings: tuple[str, ...]
    record: int = VERSION

    SCORES: ClassVar[tuple[str, str]] = ("map50_95", "map50")

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise InputDataError(f"record of a run: {fault}; run it again: cache-kd run RECIPE")

    def _fault(self) -> str | None:
        if self.record != VERSION:
            return f"record is {self.record}; allowed: {VERSION}"
        if self.mode not in MODES:
            return f"mode is {short(self.mode)}; allowed: {', '.join(MODES)}"
        if not self.arm:
            return "arm is empty; allowed: the name of what is compared"
        counted = [epoch.epoch for epoch in self.epochs]
        if counted != sorted(set(counted)) or any(number < 1 for number in counted):
            return f"epochs are {short(counted)}; allowed: rising from 1"
        clock = [epoch.seconds for epoch in self.epochs]
        if clock != sorted(clock) or any(second < 0 for second in clock):
            return f"the epochs' seconds are {short(clock)}; allowed: since the start, rising"
        for name in self.SCORES if self.judged else ():
            value = getattr(self.judged, name)
            if not 0 <= value <= 1:
                return f"judged {name} is {value}; allowed: 0 to 1"
        try:
            datetime.fromisoformat(self.started)
        except ValueError:
            return f"started is {short(self.started)}; allowed: a time as 2026-11-21T10:00:00+00:00"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON holds it; what is not finite becomes null."""
        content: dict[str, Any] = to_json(self)
        return {"record": content.pop("record"), **content}

    @classmethod
    def from_json(cls, content: Any, where: str = "record") -> RunRecord:
        """Return the record in parsed JSON; `where` names it in messages.

        Raises:
            InputDataError: It is no such record: which key, what it holds, what is allowed.
        """
        try:
            found: RunRecord = from_json(cls, content)
        except FieldFault as fault:
            raise InputDataError(f"{where} is not the record of a run: {fault}") from None
        return found

    def write(self, path: Path) -> None:
        """Write the record as `path`, whole at every moment; its folder is there."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(path, text.encode())

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Return the record in a file.

        Raises:
            MissingFileError: There is no such file.
            InputDataError: It is no record of a run.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise MissingFileError(f"no such file: {path}; a run of `cache-kd run` leaves one") from None
        except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are both ValueError
            raise InputDataError(f"{path} is not JSON: {' '.join(str(error).split())}; delete it") from None
        try:
            return cls.from_json(content, str(path))
        except InputDataError as error:
            known = str(error)
            raise InputDataError(known if str(path) in known else f"{path}: {known}") from None
