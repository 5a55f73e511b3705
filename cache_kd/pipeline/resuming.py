"""In: the checkpoint of an interrupted training. Out: settings to go on with, checked to be those it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_kd.cache.places import parse_place
from cache_kd.cache.store import Place
from cache_kd.config import read_yaml
from cache_kd.errors import MismatchError, MissingFileError, SettingError
from cache_kd.losses import parse_losses
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.train_settings import NO_LOSSES, TrainSettings, balanced
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.trainer import RECORD


def resumed_settings(settings: TrainSettings, extra: dict[str, Any]) -> tuple[TrainSettings, dict[str, Any]]:
    """Return the settings of an interrupted run, taken from its folder, when `resume=` names a checkpoint."""
    resume = extra.get("resume")
    if not resume:
        return settings, extra
    checkpoint = Path(settings.student if resume is True else str(resume))
    if not checkpoint.is_file():
        raise MissingFileError(f"resume={resume}: no such checkpoint; allowed: resume=runs/detect/NAME/weights/last.pt")
    record = checkpoint.parent.parent / RECORD
    if not record.is_file():
        raise MismatchError(
            f"resume={resume}: {record} is missing, so this is no run of cache-kd; resume it with yolo train, or "
            f"start a new run from it: cache-kd train --student {checkpoint}"
        )
    recorded = _read_record(record)
    asked = _written(settings)
    if asked and asked != recorded["losses"]:
        raise MismatchError(
            f"{checkpoint} was trained with {', '.join(recorded['losses'])}, --loss says {', '.join(asked)}; "
            "leave --loss out to go on, or start a new run"
        )
    if settings.balance is not None and not asked and not _balances(recorded["losses"], settings.balance):
        raise MismatchError(
            f"{checkpoint} was trained with {', '.join(recorded['losses'])}, not with --balance "
            f"{settings.balance:g}; leave --balance out to go on, or start a new run"
        )
    views = _recorded_views(recorded, record)
    for option, given, held in zip(
        ("--views", "--plain-views"), (settings.views, settings.plain_views), views, strict=True
    ):
        if given is not None and given != held:
            raise MismatchError(
                f"{checkpoint} was trained with {option} {held}, not {given}; leave {option} out to go on, or start a "
                "new run"
            )
    cache = settings.cache or parse_place(recorded["cache"])
    identity = Cache(cache).manifest.identity_digest
    if identity != recorded["identity"]:
        raise MismatchError(
            f"{checkpoint} was trained from cache {recorded['identity'][:8]}, {cache} is {identity[:8]}; "
            f"name the first one: --cache {recorded['cache']}"
        )
    window = _recorded_window(recorded, record, cache)
    if settings.shuffle_window is not None and settings.shuffle_window != window:
        raise MismatchError(
            f"{checkpoint} was trained with --shuffle-window {window}, not {settings.shuffle_window}; leave it out to "
            "go on, or start a new run"
        )
    resumed = TrainSettings(
        student=str(checkpoint),
        cache=cache,
        data=settings.data,
        losses=tuple(recorded["losses"]),
        verify_pixels=settings.verify_pixels,
        views=views[0],
        plain_views=views[1],
        fetch_limit=settings.fetch_limit,
        shuffle_window=window,
        threads=settings.threads,
        trust_student=settings.trust_student,
        imports=settings.imports,
    )
    # The checkpoint names a folder and a teacher, too: a run moved or received from others must not follow them.
    own = {"save_dir": str(checkpoint.parent.parent), "distill_model": None}
    return resumed, {**own, **extra, "resume": str(checkpoint)}


def _read_record(path: Path) -> dict[str, Any]:
    """Return what a run recorded; raises `MismatchError` if that cannot be its record."""
    recorded = read_yaml(path)
    losses = recorded.get("losses")
    faults = [f"{key} is not a text" for key in ("cache", "identity") if not isinstance(recorded.get(key), str)]
    if not isinstance(losses, list) or not losses or not all(isinstance(loss, str) for loss in losses):
        faults.append("losses is not a list of texts")
    views = recorded.get("views")
    if not isinstance(views, list) or not all(isinstance(view, str) for view in views):
        faults.append("views is not a list of texts")
    if faults:
        raise MismatchError(f"{path} is not the record of a run: {', '.join(faults)}; start a new run")
    return recorded


def _recorded_views(recorded: dict[str, Any], path: Path) -> tuple[int, int]:
    """Return how many mixed and plain views a run shows: a cache topped up since must not change its schedule."""
    try:
        kinds = [View.parse(name).kind for name in recorded["views"]]
    except SettingError as error:
        raise MismatchError(f"{path} is not the record of a run: {error}; start a new run") from None
    return kinds.count("mixed"), kinds.count("plain")


def _recorded_window(recorded: dict[str, Any], path: Path, cache: Place) -> int:
    """Return the shards within which a run shuffles: another limit of local copies must not change its order."""
    window = recorded.get("shuffle_window")
    if window is None:
        manifest = Cache(cache).manifest
        return -(-manifest.num_images // manifest.shard_size)
    if type(window) is not int or window < 1:
        raise MismatchError(f"{path} is not the record of a run: shuffle_window is {window!r}; start a new run")
    return window


def _balances(recorded: list[str], share: float) -> bool:
    """Return whether a run with these losses is what `--balance share` makes: each holds a share, one this share."""
    shares = [] if recorded == [NO_LOSSES] else [spec.balance for spec in parse_losses(recorded)]
    return all(shares) and share in shares


def _written(settings: TrainSettings) -> list[str]:
    """Return the canonical texts of the losses that are asked for, as a run records them; none asks for none."""
    if settings.losses == (NO_LOSSES,):
        return [NO_LOSSES]
    return [str(spec) for spec in balanced(parse_losses(list(settings.losses)), settings.balance)]
