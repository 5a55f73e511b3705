"""In: names and settings. Out: planned runs, records of runs, and starters that do nothing real."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_kd.pipeline.recipes.plan import OPEN, PlannedRun, RecipePlan, RunTask
from cache_kd.pipeline.recipes.recipe import Recipe
from cache_kd.report.record import FILE, CostRecord, EpochRecord, Judgement, MachineRecord, RunRecord


def task(folder: Path, arm: str = "plain", seed: int = 0, **changes: Any) -> RunTask:
    """Return a run of a recipe in `folder`."""
    content: dict[str, Any] = {
        "recipe": folder.name,
        "study": "Is it?",
        "arm": arm,
        "mode": "plain",
        "seed": seed,
        "student": "yolov8n.yaml",
        "teacher": None,
        "data": "bccd.yaml",
        "imgsz": 64,
        "split": "val",
        "judge": "last",
        "losses": (),
        "balance": None,
        "cache": None,
        "views": None,
        "plain_views": None,
        "settings": {"epochs": 2, "batch": 4},
        "overrides": {},
        "imports": (),
        "trust_teacher": False,
        "trust_student": False,
        "fingerprint": "f" * 8,
        "folder": str(folder / f"{arm}-s{seed}"),
    }
    return RunTask(**{**content, **changes})


def planned(folder: Path, arm: str = "plain", seed: int = 0, status: str = OPEN, **changes: Any) -> PlannedRun:
    return PlannedRun(task(folder, arm, seed, **changes), status, None)


def plan(folder: Path, *runs: PlannedRun) -> RecipePlan:
    """Return a plan of these runs."""
    recipe = Recipe(
        path=Path("r.yaml"), name=folder.name, question="Is it?", teacher=Path("best.pt"), data=Path("bccd.yaml"),
        imgsz=64, seeds=(0,), split="val", judge="last", augment={}, caches={}, arms=(),
    )  # fmt: skip
    return RecipePlan(recipe, (), runs, folder)


def write_record(run: RunTask, *, points: float = 0.5, seconds: float = 10.0) -> None:
    """Write the record that a run leaves."""
    Path(run.folder).mkdir(parents=True, exist_ok=True)
    RunRecord(
        recipe=run.recipe, study=run.study, arm=run.arm, mode=run.mode, seed=run.seed, student=run.student,
        teacher=None, data=run.data, split=run.split, losses=run.losses, cache=None,
        settings={**run.settings, "imgsz": run.imgsz}, fingerprint=run.fingerprint, versions={},
        machine=MachineRecord("none", 1, None, 1), started="2026-11-21T10:00:00+00:00",
        cost=CostRecord(seconds, 0, None, None, None),
        epochs=tuple(EpochRecord(n + 1, seconds, {}) for n in range(run.settings["epochs"])),
        judged=Judgement("last", run.split, points, points), warnings=(),
    ).write(Path(run.folder) / FILE)  # fmt: skip


@dataclass
class Quick:
    """A starter whose runs last some polls and end as they are told: 0 leaves a record."""

    codes: dict[str, int] = field(default_factory=dict)
    polls: int = 2
    interrupt_after: int | None = None
    started: list[RunTask] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    at_once: int = 0
    _running: int = 0

    def __call__(self, run: RunTask, gpu: int | None) -> _Run:
        self.started.append(run)
        self._running += 1
        self.at_once = max(self.at_once, self._running)
        return _Run(self, run)

    @property
    def names(self) -> list[str]:
        return [Path(run.folder).name for run in self.started]


@dataclass
class _Run:
    owner: Quick
    run: RunTask
    seen: int = 0

    def ended(self) -> int | None:
        self.seen += 1
        if self.owner.interrupt_after is not None and len(self.owner.started) > self.owner.interrupt_after:
            raise KeyboardInterrupt
        if self.seen < self.owner.polls:
            return None
        self.owner._running -= 1
        name = Path(self.run.folder).name
        code = self.owner.codes.get(name, 0)
        if not code:
            write_record(self.run)
        return code

    def stop(self) -> None:
        self.owner.stopped.append(Path(self.run.folder).name)
