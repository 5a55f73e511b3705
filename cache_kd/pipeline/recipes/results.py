"""In: a recipe's plan, and how its runs ended. Out: both in words for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache_kd.pipeline.recipes.cache_tasks import CacheTask
from cache_kd.pipeline.recipes.plan import CHANGED, DONE, ELSEWHERE, OPEN, RESUME, PlannedRun, RecipePlan
from cache_kd.pipeline.sizes import duration, megabytes
from cache_kd.report.record import RunRecord

WORDS = {
    DONE: "done",
    ELSEWHERE: "done in {}, is copied",
    RESUME: "begun, goes on",
    OPEN: "to do",
    CHANGED: "to do again: its folder holds a run of other settings",
}


@dataclass(frozen=True)
class Finished:
    """A run that was planned and how it ended: its record, or one line about why there is none."""

    run: PlannedRun
    record: RunRecord | None
    error: str | None


@dataclass(frozen=True)
class RecipeResult:
    """What a recipe left; `finished` holds the runs of the plan, those that were done before too."""

    plan: RecipePlan
    finished: tuple[Finished, ...]

    @property
    def ok(self) -> bool:
        return all(run.error is None for run in self.finished)

    @property
    def records(self) -> tuple[RunRecord, ...]:
        return tuple(run.record for run in self.finished if run.record is not None)

    def to_json(self) -> dict[str, Any]:
        """Return plan and results as JSON holds them."""
        ended = {run.run.name: run for run in self.finished}
        runs = []
        for run in self.plan.runs:
            end = ended.get(run.name)
            judged = end.record.judged if end and end.record else None
            runs.append(
                {
                    "run": run.name,
                    "arm": run.task.arm,
                    "seed": run.task.seed,
                    "folder": run.task.folder,
                    "fingerprint": run.task.fingerprint,
                    "before": run.status,
                    "expected_seconds": run.seconds,
                    "mAP50-95": judged.map50_95 if judged else None,
                    "seconds": end.record.cost.seconds if end and end.record else None,
                    "error": end.error if end else None,
                }
            )
        caches = [
            {
                "cache": cache.name,
                "path": str(cache.path),
                "done": cache.done,
                "needed": cache.needed,
                "expected_seconds": cache.seconds,
                "expected_bytes": cache.bytes,
            }
            for cache in self.plan.caches
        ]
        recipe = self.plan.recipe
        return {"recipe": recipe.name, "question": recipe.question, "caches": caches, "runs": runs}


def plan_lines(plan: RecipePlan, jobs: int) -> list[str]:
    """Return the plan as lines: caches and runs in their order, how each stands, what is left and what it takes."""
    recipe = plan.recipe
    lines = [f"{recipe.name}: {recipe.question}"]
    for cache in plan.caches:
        lines.append(f"  cache {cache.name}  {cache.path}: {_cache_words(cache)}")
    width = max(len(run.name) for run in plan.runs)
    for run in plan.runs:
        time = f", about {duration(run.seconds)}" if run.seconds is not None else ""
        lines.append(f"  run   {run.name:{width}}  {_run_words(run)}{time}")
    return [*lines, left_line(plan, jobs)]


def _run_words(run: PlannedRun) -> str:
    return WORDS[run.status].format("/".join(run.done_in.parts[-2:]) if run.done_in else "")


def _cache_words(cache: CacheTask) -> str:
    if cache.done:
        return f"done, {len(cache.views)} views"
    if not cache.needed:
        return "not there, and no open run needs it"
    how = f"to recode from {cache.recode}" if cache.recode else f"to extract, {len(cache.views)} views"
    size = f", about {megabytes(cache.bytes)}" if cache.bytes is not None else ""
    return how + size + (f", {duration(cache.seconds)}" if cache.seconds is not None else "")


def left_line(plan: RecipePlan, jobs: int) -> str:
    """Return in one line what is left: runs, seconds as far as they are known, bytes of caches."""
    left = plan.left
    if not left:
        return f"nothing is left of {len(plan.runs)} runs"
    known = [run.seconds for run in left if run.seconds is not None]
    unknown = len(left) - len(known)
    caches = [cache for cache in plan.caches if cache.needed]
    seconds = sum(known) / jobs + sum(cache.seconds or 0 for cache in caches)
    parts = [f"{len(left)} of {len(plan.runs)} runs left, {jobs} at once"]
    if seconds:
        parts.append(f"about {duration(seconds)}" + (f" and {unknown} runs of unknown length" if unknown else ""))
    else:
        parts.append("time unknown until the first run is done")
    if size := sum(cache.bytes or 0 for cache in caches):
        parts.append(f"about {megabytes(size)} of caches")
    return ", ".join(parts)


def done_line(run: PlannedRun, record: RunRecord | None, error: str | None) -> str:
    """Return in one line how a run ended."""
    if error is not None or record is None:
        return f"{run.name}: failed: {error}"
    judged = record.judged
    points = f"mAP50-95 {judged.map50_95:.4f} on {judged.split}, " if judged else ""
    return f"{run.name}: {points}{duration(record.cost.seconds or 0)}"


def summary_lines(result: RecipeResult) -> list[str]:
    """Return mean and range of every arm, what failed, and the next command."""
    lines = []
    for arm in dict.fromkeys(run.task.arm for run in result.plan.runs):
        found = [record.judged.map50_95 for record in result.records if record.arm == arm and record.judged]
        if found:
            mean = sum(found) / len(found)
            seeds = f"{len(found)} seed" + ("s" if len(found) > 1 else "")
            lines.append(f"{arm}: mAP50-95 {mean:.4f} [{min(found):.4f}, {max(found):.4f}], {seeds}")
    failed: Sequence[Finished] = [run for run in result.finished if run.error is not None]
    lines += [f"{run.run.name}: failed: {run.error}" for run in failed]
    if failed:
        return [*lines, f"{len(failed)} of {len(result.plan.runs)} runs failed; the same command tries them again"]
    return [*lines, f"all {len(result.plan.runs)} runs are done; look at them: cache-kd report {result.plan.folder}"]
