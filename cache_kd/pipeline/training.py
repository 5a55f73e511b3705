"""In: a student, a cache, losses. Out: an Ultralytics run trained on stored targets; the teacher is never loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache_kd.cache.last_use import mark_used
from cache_kd.cache.manifest import Manifest
from cache_kd.cache.object_store import Fetching
from cache_kd.cache.places import open_store
from cache_kd.cache.store import Place, Store
from cache_kd.errors import CacheKDError, SettingError
from cache_kd.fingerprint import compare_sources
from cache_kd.losses import LossSpec, parse_losses
from cache_kd.pipeline.default_losses import default_losses
from cache_kd.pipeline.fetching import arrays_read, fetch_ahead, shuffle_window
from cache_kd.pipeline.locations import newest_cache
from cache_kd.pipeline.opened import Cache, extract_command
from cache_kd.pipeline.packed import check_class_names, check_decoder
from cache_kd.pipeline.resuming import resumed_settings
from cache_kd.pipeline.stored_boxes import stored_boxes
from cache_kd.pipeline.train_settings import NO_LOSSES, PROOFS, TrainSettings, balanced
from cache_kd.pipeline.versions import other_versions, version_differences
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.gate import import_user_modules, no_download_entries, safe_loading
from cache_kd.ultralytics_bridge.launch import launch
from cache_kd.ultralytics_bridge.models import check_pretrained, check_resumed, check_student
from cache_kd.ultralytics_bridge.plan import DistillPlan
from cache_kd.ultralytics_bridge.settings import (
    check_pixel_settings,
    check_settings,
    check_training_settings,
    fixed_overrides,
)
from cache_kd.ultralytics_bridge.trainer import DistillTrainer
from cache_kd.ultralytics_bridge.training_data import TargetSource, TrainingDataset
from cache_kd.views.recipe import Recipe

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run leaves: its folder, the losses, and the validation metrics of its best checkpoint."""

    folder: Path
    losses: tuple[LossSpec, ...]
    metrics: dict[str, float]


def train(settings: TrainSettings, *, say: Callable[[str], None] = LOG.info) -> Trained:
    """Train a student from a cache; see `TrainSettings`.

    Raises:
        CacheKDError: One line about what does not fit, before anything is trained.
    """
    if settings.verify_pixels not in PROOFS:
        raise SettingError(f"--verify-pixels {settings.verify_pixels!r}; allowed: {', '.join(PROOFS)}")
    extra = dict(settings.settings or {})
    import_user_modules(settings.imports)  # first: a file may add losses to `LOSSES`
    settings, extra = resumed_settings(settings, extra)
    cache = _open(settings, say)
    differing = other_versions(cache.manifest.identity)
    if differing and cache.packing is None:  # what is packed was made before; `check_decoder` asks for more than names
        LOG.warning(
            "other versions than at the extraction may make other pixels: %s; %s",
            differing,
            PROOFS[settings.verify_pixels],
        )
    recipe = Recipe.from_settings(cache.manifest.recipe)
    check_settings(extra)
    check_training_settings(extra)
    check_pixel_settings(extra, recipe, cache.manifest.imgsz)
    losses = _losses(settings, cache.manifest)
    chosen_views(cache.manifest, settings)
    say(f"losses: {', '.join(map(str, losses)) or 'none, a plain run on the same views'}")
    if extra.get("resume"):
        check_resumed(Path(settings.student), trusted=settings.trust_student)
    else:
        check_student(settings.student, trusted=settings.trust_student)
        check_pretrained(extra.get("pretrained"), trusted=settings.trust_student)
    data_file = cache.data_file()
    data = load_data(data_file, train_images=cache.packing is None)
    if cache.packing is not None:
        check_class_names(cache.manifest.teacher, data, data_file)
    overrides = {
        "project": str(Path.cwd() / "runs" / "detect"),
        **extra,
        **fixed_overrides(recipe, cache.manifest.imgsz),
        "model": settings.student,
        "data": str(data_file),
        "task": "detect",
        "mode": "train",
    }
    if settings.name:
        overrides["name"] = settings.name
    if not Path(overrides["project"]).is_absolute():
        overrides["project"] = str(Path.cwd() / overrides["project"])
    with safe_loading(trusted=settings.trust_student), no_download_entries():
        trainer = _trainer(DistillTrainer, cache, losses, settings, overrides)
        try:
            outcomes = _on_every_device(trainer, cache, settings) if trainer.ddp else [_run(trainer)]
        except KeyboardInterrupt as interrupt:
            last = Path(trainer.last)
            again = f"go on after the last whole epoch: cache-kd train resume={last}"
            interrupt.add_note(again if last.exists() else "no epoch was finished, run the same command again")
            raise
    if losses:
        checked, served = (sum(outcome["proven"][part] for outcome in outcomes) for part in (0, 1))
        say(f"pixels: {checked} of {served} items compared with the teacher's{', all equal' if checked else ''}")
    return Trained(Path(trainer.save_dir), losses, outcomes[0]["metrics"])


def _trainer(
    kind: type[DistillTrainer],
    cache: Cache,
    losses: tuple[LossSpec, ...],
    settings: TrainSettings,
    overrides: dict[str, Any],
    callbacks: Any = None,
    **more: Any,
) -> DistillTrainer:
    plan = distill_plan(cache, losses, settings)
    trainer = kind(plan, overrides, callbacks, **more)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if trainer.leads:
        # Not before: a run that is refused leaves nothing behind.
        trainer.add_callback("on_train_start", lambda _: mark_used(cache.path))
        fetch_ahead(trainer, cache, _arrays(cache, plan.targets), plan.window)
    return trainer


def _run(trainer: DistillTrainer) -> dict[str, Any]:
    """Train in this process; return its metrics, and (compared, all) items that it was shown."""
    trainer.train()
    metrics = {str(key): float(value) for key, value in (trainer.metrics or {}).items()}
    return {"metrics": metrics, "proven": list(trainer.train_loader.proven)}


def _on_every_device(trainer: DistillTrainer, cache: Cache, settings: TrainSettings) -> list[Mapping[str, Any]]:
    """Train in one process a device and return what `_run` returns in each, the first one's first."""
    named = replace(settings, cache=cache.path, data=cache.data_file())
    try:
        return launch(trainer, partial(train_rank, named, type(trainer)))
    except CacheKDError:
        trainer.discard()
        raise


def train_rank(
    settings: TrainSettings, kind: type[DistillTrainer], cfg: Any, overrides: dict[str, Any], callbacks: Any
) -> dict[str, Any]:
    """Do one device's part of a run that another process has checked and launched; see `launch`.

    Args:
        settings: as `train` has completed them. kind: the trainer's class.
        cfg, overrides, callbacks: what Ultralytics' launch file hands over, the run's settings among them.
    """
    import_user_modules(settings.imports)
    cache = _open(settings, LOG.info)
    with safe_loading(trusted=settings.trust_student), no_download_entries():
        return _run(_trainer(kind, cache, _losses(settings, cache.manifest), settings, overrides, callbacks, cfg=cfg))


def _open(settings: TrainSettings, say: Callable[[str], None]) -> Cache:
    if settings.cache is not None:
        return Cache(_store(settings.cache, settings), data=settings.data)
    path, candidates = newest_cache()
    others = f", the newest of {candidates}; another one: --cache DIR" if candidates > 1 else ""
    say(f"cache: {path}{others}")
    return Cache(_store(path, settings), data=settings.data)


def _store(path: Place, settings: TrainSettings) -> Store:
    return open_store(path, Fetching.from_environment(settings.fetch_limit))


def _losses(settings: TrainSettings, manifest: Manifest) -> tuple[LossSpec, ...]:
    if settings.losses == (NO_LOSSES,):
        return ()
    return balanced(
        parse_losses(list(settings.losses or default_losses(manifest.codec["store"], manifest.head))), settings.balance
    )


def distill_plan(cache: Cache, losses: tuple[LossSpec, ...], settings: TrainSettings) -> DistillPlan:
    """Return what a run with these losses takes from the cache; raises `MismatchError` if it lacks what they need."""
    manifest, codec = cache.manifest, cache.codec
    difference = check_decoder(cache.reader, cache.packing) if cache.packing else 0
    targets = None
    if losses:
        needed = {f"loss {spec.name}": spec.needs for spec in losses}
        for name, needs in needed.items():
            codec.columns_for(needs, needed_by=name, command=extract_command(manifest))
        columns = codec.columns_for(frozenset[str]().union(*needed.values()))
        targets = TargetSource(
            reader=cache.reader,
            columns=columns,
            row_bytes=sum(column.row_bytes for column in codec.columns if column.name in columns),
            ragged=frozenset(column.name for column in codec.columns if column.ragged),
            verify="off" if difference else settings.verify_pixels,
            context=version_differences(manifest.identity),
        )

    def check_data(dataset: TrainingDataset) -> None:
        compare_sources(cache.images, dataset.sources())

    views = chosen_views(manifest, settings)
    window = shuffle_window(cache, views, _arrays(cache, targets), settings.shuffle_window, LOG.info)
    record = {**_record(cache, losses, settings), "shuffle_window": window.shards if window else None}
    return DistillPlan(
        losses=losses,
        views=views,
        recipe=Recipe.from_settings(manifest.recipe),
        imgsz=manifest.imgsz,
        seed=manifest.seed,
        teacher=manifest.head,
        targets=targets,
        decode=codec.decode,
        head=cache.frozen_head,
        check_data=check_data,
        packed=cache.packed,
        record={**record, **({"decoder_difference": difference} if cache.packing else {})},
        boxes=stored_boxes(cache),
        window=window,
    )


def _arrays(cache: Cache, targets: TargetSource | None) -> frozenset[str]:
    """Return the stored arrays that a run reads."""
    return arrays_read(
        cache, targets.columns if targets else (), proven=targets is not None and targets.verify != "off"
    )


def chosen_views(manifest: Manifest, settings: TrainSettings) -> tuple[View, ...]:
    """Return the views that a run shows: the first of each kind, as many as the settings say, None for all.

    A cache's first K views are those of a cache of K views, so one cache of many serves runs on fewer.

    Raises:
        SettingError: The cache has fewer.
    """
    shown: list[View] = []
    for kind, option, count in (
        ("mixed", "--views", settings.views),
        ("plain", "--plain-views", settings.plain_views),
    ):
        have = [view for view in manifest.views if view.kind == kind]
        if count is not None and not 0 <= count <= len(have):
            raise SettingError(
                f"{option} {count}; the cache has {len(have)} {kind} views, allowed: 0 to {len(have)}; more: "
                f"{extract_command(manifest)}"
            )
        shown += have if count is None else [view for view in have if view.number < count]
    if not shown:
        raise SettingError("--views 0 --plain-views 0 leaves nothing to show; allowed: at least one view")
    return tuple(shown)


def _record(cache: Cache, losses: tuple[LossSpec, ...], settings: TrainSettings) -> dict[str, Any]:
    manifest = cache.manifest
    return {
        "cache": str(cache.path.resolve()),
        "identity": manifest.identity_digest,
        "digest": manifest.digest,
        "teacher": {key: manifest.teacher[key] for key in ("file", "file_sha256", "weights_sha256")},
        "losses": [str(spec) for spec in losses] or [NO_LOSSES],
        "views": [view.name for view in chosen_views(manifest, settings)],
        "student": settings.student,
        "verify_pixels": settings.verify_pixels,
        "pack": cache.packing.spec if cache.packing else "none",
    }
