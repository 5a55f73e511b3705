"""In: what a training may be told. Out: the same in one value, with the losses that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_kd.cache.store import Place
from cache_kd.errors import SettingError
from cache_kd.losses import LossSpec
from cache_kd.losses.spec import COMMON

PROOFS = {
    "first": "the first batches and a sample of all others are compared with the teacher's",
    "all": "every batch is compared with the teacher's",
    "off": "with --verify-pixels off nothing shows it; leave that out",
}
NO_LOSSES = "none"


@dataclass(frozen=True)
class TrainSettings:
    """Everything that `cache-kd train` can be told.

    Attributes:
        student: model YAML or checkpoint. cache: folder; None takes the newest complete one.
        balance: share of the gradient at which each term is held whose spec gives no `balance`; None holds none.
        losses: specs as on the command line; none takes `default_losses`; ("none",) trains plainly on the same views.
        views, plain_views: mixed and plain views to show, the first ones; None shows all.
        fetch_limit: bytes of local copies of a cache in an object store; None takes `CACHE_KD_FETCH_LIMIT`.
        shuffle_window: shards within which images are shuffled; None: all, or as many as `fetch_limit` allows.
        threads: torch threads; None leaves Ultralytics' choice, on a CPU one fewer than its cores.
        settings: Ultralytics' own KEY=VALUE settings.
    """

    student: str
    cache: Place | None = None
    data: Path | None = None
    losses: tuple[str, ...] = ()
    balance: float | None = None
    name: str | None = None
    verify_pixels: str = "first"
    views: int | None = None
    plain_views: int | None = None
    fetch_limit: int | None = None
    shuffle_window: int | None = None
    threads: int | None = None
    trust_student: bool = False
    imports: tuple[Path, ...] = ()
    settings: Mapping[str, Any] | None = None


def balanced(losses: tuple[LossSpec, ...], share: float | None) -> tuple[LossSpec, ...]:
    """Return the specs, each held at `share` of the gradient unless it names a share of its own or is off."""
    if share is None:
        return losses
    rule = COMMON["balance"].allowed
    if not rule.test(share):
        raise SettingError(f"--balance {share:g}; allowed: {rule.text}")
    return tuple(spec if spec.balance or not spec.weight else replace(spec, balance=share) for spec in losses)
