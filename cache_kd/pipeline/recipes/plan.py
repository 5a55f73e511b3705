"""In: a recipe. Out: what is to be made and trained, what of it is there already, what the rest will take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cache_kd.errors import CacheKDError
from cache_kd.fingerprint import digest_sources, scan_sources
from cache_kd.pipeline.preparation import Plan
from cache_kd.pipeline.recipes.cache_tasks import CacheTask, Extractions
from cache_kd.pipeline.recipes.identity import run_fingerprint, split_identity, student_identity
from cache_kd.pipeline.recipes.recipe import COTRAINED, ONLINE, ArmEntry, Recipe
from cache_kd.report.record import FILE, STATE, RunRecord
from cache_kd.ultralytics_bridge.data import load_data, split_files
from cache_kd.ultralytics_bridge.settings import fixed_overrides

RUNS = Path("runs")
ERROR, LOG = "error.txt", "log.txt"
"""In a run's folder: why it failed; what its process said."""
DONE, ELSEWHERE, RESUME, OPEN, CHANGED = "done", "elsewhere", "resume", "open", "changed"


@dataclass(frozen=True)
class RunTask:
    """One training with all that it needs; JSON holds it, for the process that does it.

    Attributes:
        overrides: settings of the pixels, for trainers of Ultralytics'. cache: folder, None without. views,
            plain_views: those of the cache to show. teacher: beside the run, None without.
    """

    recipe: str
    study: str
    arm: str
    mode: str
    seed: int
    student: str
    teacher: str | None
    data: str
    imgsz: int
    split: str
    judge: str
    losses: tuple[str, ...]
    balance: float | None
    cache: str | None
    views: int | None
    plain_views: int | None
    settings: dict[str, Any]
    overrides: dict[str, Any]
    imports: tuple[str, ...]
    trust_teacher: bool
    trust_student: bool
    fingerprint: str
    folder: str
    threads: int = 1

    def to_json(self) -> str:
        """Return the task as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunTask:
        """Return the task in a line of `to_json`."""
        content = json.loads(text)
        tuples = {key: tuple(content[key]) for key in ("losses", "imports")}
        return cls(**{**content, **tuples})


@dataclass(frozen=True)
class PlannedRun:
    """A run and how it stands: `done`, `elsewhere` (another recipe did it), `resume`, `open`, or `changed`: another
    one lies in its folder.

    `cache` is the recipe's name of the cache that it reads; `seconds` are expected, None where nothing tells; `done_in`
    is the other recipe's folder of the run.
    """

    task: RunTask
    status: str
    cache: str | None
    seconds: float | None = None
    done_in: Path | None = None

    @property
    def name(self) -> str:
        return Path(self.task.folder).name


@dataclass(frozen=True)
class RecipePlan:
    """Everything that a recipe asks for, in the order in which it is done.

    `changes` are the words of `--set`, `only` those of `--arm`.
    """

    recipe: Recipe
    caches: tuple[CacheTask, ...]
    runs: tuple[PlannedRun, ...]
    folder: Path
    changes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[PlannedRun, ...]:
        """Those to train."""
        return tuple(run for run in self.runs if run.status not in (DONE, ELSEWHERE))

    @property
    def elsewhere(self) -> tuple[PlannedRun, ...]:
        """Those to copy."""
        return tuple(run for run in self.runs if run.status == ELSEWHERE)


def make_recipe_plan(recipe: Recipe, say: Callable[[str], None]) -> RecipePlan:
    """Look at the teacher, the data and what is there already; nothing is written.

    Raises:
        CacheKDError: One line about a file that cannot be used.
    """
    folder = (RUNS / recipe.name).absolute()
    extractions = Extractions(recipe, say)
    images = extractions.base.sources
    judged = {"weights": recipe.judge, **split_identity(recipe.data, recipe.split)}
    if recipe.judge == "best":  # chosen on the validation images
        judged["chosen_on"] = digest_sources(scan_sources(*split_files(load_data(recipe.data), "val")))
    runs = []
    for seed in recipe.seeds:  # outermost: whatever ends early has all arms of the first seeds
        for arm in recipe.arms:
            task = _task(recipe, arm, seed, folder, extractions, judged, digest_sources(images))
            runs.append(PlannedRun(task, run_status(task), arm.cache))
    runs = expected(found_elsewhere(runs, folder), folder)
    plan = RecipePlan(recipe, (), tuple(runs), folder)
    needed = {run.cache for run in plan.left if run.cache is not None}
    return replace(plan, caches=extractions.forecasts(extractions.tasks(needed)))


def _task(
    recipe: Recipe,
    arm: ArmEntry,
    seed: int,
    folder: Path,
    extractions: Extractions,
    judged: Mapping[str, Any],
    images: Mapping[str, Any],
) -> RunTask:
    base = extractions.base
    teacher = arm.mode in (ONLINE, COTRAINED)
    shown: tuple[int | None, int | None] = (None, None)
    cache = None
    overrides = fixed_overrides(base.recipe, base.imgsz)
    if arm.cache is not None:
        mixed, plain = recipe.counts(arm.cache)
        shown = (arm.views or mixed, plain)
        cache = {**extractions.key(arm.cache), "views": list(shown)}
        if not arm.losses:  # the same pixels, whatever the targets: one plain run serves every fidelity
            cache = {"pixels": _pixels(base, recipe, arm.cache), "views": list(shown)}
    fingerprint = run_fingerprint(
        mode=arm.mode,
        student=student_identity(arm.student),
        teacher=base.teacher_record["weights_sha256"] if teacher else None,
        data={} if arm.cache is not None else {**images, "overrides": {k: overrides[k] for k in sorted(overrides)}},
        cache=cache,
        losses=arm.losses,
        balance=arm.balance,
        settings=arm.settings,
        seed=seed,
        judge=judged,
    )
    return RunTask(
        recipe=recipe.name,
        study=recipe.question,
        arm=arm.name,
        mode=arm.mode,
        seed=seed,
        student=arm.student,
        teacher=str(recipe.teacher.absolute()) if teacher else None,
        data=str(recipe.data.absolute()),
        imgsz=recipe.imgsz,
        split=recipe.split,
        judge=recipe.judge,
        losses=arm.losses,
        balance=arm.balance,
        cache=str(extractions.paths[arm.cache].absolute()) if arm.cache is not None else None,
        views=shown[0],
        plain_views=shown[1],
        settings=dict(arm.settings),
        overrides=overrides,
        imports=tuple(str(file.absolute()) for file in recipe.imports),
        trust_teacher=recipe.trust_teacher,
        trust_student=recipe.trust_student,
        fingerprint=fingerprint,
        folder=str(folder / f"{arm.folder}-s{seed}"),
    )


def _pixels(base: Plan, recipe: Recipe, cache: str) -> dict[str, Any]:
    """Return what the pixels of a cache's views depend on."""
    settings = recipe.root(cache).settings
    return {
        "data": digest_sources(base.sources),
        "recipe": base.recipe.to_json(),
        "imgsz": base.imgsz,
        "seed": settings.get("seed", 0),
        "pack": settings.get("pack", "none"),
    }


def run_status(task: RunTask) -> str:
    """Return how a run stands, by the files in its folder."""
    folder = Path(task.folder)
    try:
        return DONE if RunRecord.read(folder / FILE).fingerprint == task.fingerprint else CHANGED
    except CacheKDError:
        pass
    held = read_state(folder)
    if held is None:
        return OPEN
    return RESUME if held.get("fingerprint") == task.fingerprint else CHANGED


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what an unfinished run noted in its folder; None if there is none."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def found_elsewhere(runs: Sequence[PlannedRun], folder: Path) -> list[PlannedRun]:
    """Return the runs; those that a recipe whose folder lies beside `folder` has done, by their fingerprint, say so."""
    done = {record.fingerprint: path for path, record in _records(folder.parent)}

    def look(run: PlannedRun) -> PlannedRun:
        if run.status == DONE or run.task.fingerprint not in done:
            return run
        return replace(run, status=ELSEWHERE, done_in=done[run.task.fingerprint])

    return [look(run) for run in runs]


def expected(runs: Sequence[PlannedRun], folder: Path) -> list[PlannedRun]:
    """Return the open runs with the seconds that those of their arm took.

    Where none is finished: by the seconds an epoch of finished runs, of any recipe whose folder lies beside `folder`,
    that have mode, student, data and image size in common.
    """
    records = [record for _, record in _records(folder.parent)]

    def guess(task: RunTask) -> float | None:
        epochs = int(task.settings["epochs"])
        like = (task.mode, Path(task.student).name, Path(task.data).name, task.imgsz)
        alike = [r for r in records if (r.mode, r.student, r.data, r.settings.get("imgsz")) == like]
        own = [record for record in alike if (record.recipe, record.arm) == (task.recipe, task.arm)]
        rates = [(r.cost.seconds or 0.0) / len(r.epochs) for r in own or alike if r.epochs]
        return sum(rates) / len(rates) * epochs if rates else None

    return [run if run.status in (DONE, ELSEWHERE) else replace(run, seconds=guess(run.task)) for run in runs]


def _records(runs: Path) -> Iterator[tuple[Path, RunRecord]]:
    """Yield the folder and the record of every finished run."""
    for path in sorted(runs.glob(f"*/*/{FILE}")):
        with suppress(CacheKDError):
            yield path.parent, RunRecord.read(path)
