"""In: an arm, a seed, a score. Out: a record of a run made up for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cache_kd.report.record import (
    CacheRecord,
    CostRecord,
    EpochRecord,
    Judgement,
    MachineRecord,
    RunRecord,
)

EPOCHS = 12
CACHE = CacheRecord(
    path="kd_cache/bccd-best-1a2b3c4d",
    digest="9c4a9c9fbcd8c264e27e1cf3a28d6b5b96489fad30aa3e3dd6246face8b948e8",
    fidelity="default",
    views=16,
    plain_views=1,
    pack=None,
    seed=0,
    bytes=123_456_789,
    extract_seconds=40.0,
    bytes_per_view=24_500.5,
    teacher_forwards=3485,
)
LOSSES = {"cached": ("cwd:weight=2.7", "ld:weight=4.2"), "online": ("sl2:weight=1",), "cotrained": ("sl2:weight=1",)}
PACE = {"plain": 5.0, "cached": 6.0, "online": 9.0, "cotrained": 12.0}


def epoch(number: int, score: float, mode: str) -> EpochRecord:
    """Return an epoch of a curve that rises to `score`."""
    reached = score * (1 - 2.0 ** (-4 * number / EPOCHS)) / (1 - 2.0**-4)
    terms = [spec.partition(":")[0] for spec in LOSSES.get(mode, ())]
    metrics = {"train/box_loss": 3.0 / number, "metrics/mAP50(B)": reached * 1.5, "metrics/mAP50-95(B)": reached}
    return EpochRecord(
        number,
        number * PACE[mode],
        {**metrics, **{f"train/{term}_loss": 2.0 / number for term in terms}},
        dict.fromkeys(terms, 0.2 + 0.01 * number),
    )


def run(arm: str, seed: int, score: float, mode: str = "cached", **changes: Any) -> RunRecord:
    """Return the record of a run judged at `score`, its curve ending there; `changes` replaces fields."""
    made = RunRecord(
        recipe="smoke",
        study="Does the cache help?",
        arm=arm,
        mode=mode,
        seed=seed,
        student="yolov8n.yaml",
        teacher=None if mode == "plain" else "best.pt",
        data="bccd.yaml",
        split="test",
        losses=LOSSES.get(mode, ()),
        cache=CACHE if mode == "cached" else None,
        settings={"epochs": EPOCHS, "imgsz": 160, "batch": 16, "seed": seed},
        fingerprint=f"{arm}-{seed}",
        versions={"torch": "2.13.0", "ultralytics": "8.4.190"},
        machine=MachineRecord("a processor", 2, None, 1),
        started="2026-11-21T10:00:00+00:00",
        cost=CostRecord(EPOCHS * PACE[mode] + 3, 2460 if mode == "online" else 0, 1_500_000_000, None, None),
        epochs=tuple(epoch(number, score, mode) for number in range(1, EPOCHS + 1)),
        judged=Judgement("last", "test", score, score * 1.5, {"RBC": score + 0.01, "WBC": score - 0.01}),
        warnings=(),
    )
    return replace(made, **changes)


def arm(name: str, scores: list[float], mode: str = "cached", **changes: Any) -> list[RunRecord]:
    """Return one run a score, with the seeds 0, 1, …"""
    return [run(name, seed, score, mode, **changes) for seed, score in enumerate(scores)]
