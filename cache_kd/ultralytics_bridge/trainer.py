"""In: Ultralytics settings and a plan of distillation. Out: the stock trainer's run with stored targets in its loss."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.data.build import seed_worker
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG, RANK
from ultralytics.utils.torch_utils import select_device, unwrap_model

from cache_kd.cache.files import write_atomic
from cache_kd.config import to_yaml
from cache_kd.errors import AlarmError, CacheKDError, InputDataError, MismatchError, SettingError
from cache_kd.losses import LossSpec
from cache_kd.structures import FrozenHead, HeadSpec, TargetBatch, View
from cache_kd.student.alarms import TermWatch
from cache_kd.student.batch import target_columns
from cache_kd.student.distiller import Distiller
from cache_kd.student.loader import ViewLoader, ViewSampler
from cache_kd.student.prefetch import Prefetch, choose_prefetch, free_shared_memory
from cache_kd.student.schedule import ViewSchedule
from cache_kd.ultralytics_bridge.dataset import DECODED_BYTES
from cache_kd.ultralytics_bridge.first_batch import NAME as FIRST_BATCH
from cache_kd.ultralytics_bridge.first_batch import TeacherBoxes, draw_first_batch
from cache_kd.ultralytics_bridge.gate import checkpoint_globals, readable
from cache_kd.ultralytics_bridge.heads import describe_head
from cache_kd.ultralytics_bridge.packed import PackedViews
from cache_kd.ultralytics_bridge.run_files import (
    NEXT,
    drop_leftovers,
    full_disk_in_one_line,
    keep_epochs,
    next_to,
    publish_next,
    stripped_whole,
    write_tensors,
    written_aside,
)
from cache_kd.ultralytics_bridge.scan import validation_set
from cache_kd.ultralytics_bridge.student import TARGETS, DistilledMixin, attach_distiller
from cache_kd.ultralytics_bridge.training_data import PackedTrainingDataset, TargetSource, TrainingDataset
from cache_kd.views.recipe import BATCH_PIXEL_KEYS, RECIPE_KEYS, Recipe

LOG = logging.getLogger(__name__)
SIDECAR = "kd_last.pt"
GRADIENTS = "kd_gradients.csv"


@dataclass(frozen=True)
class DistillPlan:
    """What a run takes from a cache.

    Attributes:
        losses: the terms; empty for a plain run on the same views.
        views: the cache's views. recipe, imgsz, seed: what its pixels are made of.
        teacher: its teacher's head. targets: where items find their columns; None without losses.
        needs_to_columns, decode: the codec's, by which columns become targets on the device.
        head: returns the teacher's head, for losses that run it.
        check_data: called with a training set of images before the first epoch; raises when it is not the teacher's.
        packed: the views that the cache keeps itself, which replace images; None where it keeps none.
        record: what `cache_kd.yaml` in the run's folder says; a resumed run must agree with it.
        boxes: the teacher's boxes of a view, for the picture of the first batch; None where the cache has no logits.
    """

    losses: tuple[LossSpec, ...]
    views: tuple[View, ...]
    recipe: Recipe
    imgsz: int
    seed: int
    teacher: HeadSpec
    targets: TargetSource | None
    decode: Callable[[Mapping[str, torch.Tensor]], TargetBatch]
    head: Callable[[], FrozenHead]
    check_data: Callable[[TrainingDataset], None]
    packed: PackedViews | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    boxes: TeacherBoxes | None = None


class DistillTrainer(DetectionTrainer):
    """Ultralytics' detection trainer on the views of a cache.

    EMA, checkpoints, validation, callbacks, AMP and resuming are the stock trainer's. Adapters are in the optimizer, in
    parameter groups of their own, and in a sidecar file beside last.pt.
    """

    def __init__(self, plan: DistillPlan, overrides: dict[str, Any], _callbacks: Any = None) -> None:
        self.plan = plan
        workers = overrides.get("workers")
        check_device(overrides.get("device"))
        project = Path(overrides["project"])
        self._made = [folder for folder in (project, *project.parents) if not folder.exists()]
        with _one_line():
            super().__init__(DEFAULT_CFG, overrides, _callbacks)
        if self.device.type == "cpu" and workers:
            self.args.workers = workers  # Ultralytics sets 0 on the CPU even where the user asked for some
        if self.args.compile and plan.losses:
            LOG.warning("compile=%s is switched off: torch.compile is untested with distillation", self.args.compile)
            self.args.compile = False
        self._dataset: TrainingDataset | PackedTrainingDataset | None = None
        self._watch = TermWatch(shlex.quote(str(plan.record.get("cache", "CACHE"))))

    # -- data -------------------------------------------------------------------------------------------------------

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        stride = max(int(unwrap_model(self.model).stride.max()), 32)
        if mode != "train":
            return validation_set(self.args, img_path, batch=batch, data=self.data, mode=mode, stride=stride)
        if self._dataset is None and self.plan.packed is not None:
            self._dataset = PackedTrainingDataset(self.plan.packed, targets=self.plan.targets)
        if self._dataset is None:
            self._dataset = images = TrainingDataset(
                self.data,
                targets=self.plan.targets,
                recipe=self.plan.recipe,
                imgsz=self.plan.imgsz,
                seed=self.plan.seed,
                stride=stride,
                decoded_bytes=(1 << 62) if self.args.cache in (True, "ram") else DECODED_BYTES,
            )
            self.plan.check_data(images)
        return self._dataset

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        if mode != "train":
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        self._check_trainable()  # the first step after freezing layers
        dataset = self.build_dataset(dataset_path, mode, batch_size)
        batch_size = min(batch_size, len(dataset))
        ahead = self._prefetch(batch_size)
        return ViewLoader(
            dataset,
            batch_size=batch_size,
            sampler=ViewSampler(len(dataset), self._schedule(), seed=self.args.seed),
            num_workers=ahead.workers,
            persistent_workers=ahead.workers > 0,
            prefetch_factor=ahead.ahead or None,
            pin_memory=self.device.type == "cuda",
            collate_fn=dataset.collate_fn,
            worker_init_fn=seed_worker,
        )

    def _prefetch(self, batch_size: int) -> Prefetch:
        """Return how far the workers run ahead, and say what memory that takes."""
        targets = self.plan.targets
        item_bytes = 3 * self.plan.imgsz**2 + (targets.row_bytes if targets else 0)
        workers = min(os.cpu_count() or 1, self.args.workers)
        chosen = choose_prefetch(batch_size * item_bytes, workers, free_shared_memory())
        every_image = self.plan.packed is None and self.args.cache in (True, "ram")
        decoded = 0 if self.plan.packed is not None or every_image else DECODED_BYTES
        LOG.info(
            "loading takes at most %.0f MiB%s: %d batches of %.1f MiB, the rest kept by each process that makes them",
            chosen.total_bytes(decoded) / 2**20,
            " and all images, decoded, a process" if every_image else "",
            chosen.batches,
            chosen.batch_bytes / 2**20,
        )
        return chosen

    def _schedule(self) -> ViewSchedule:
        return ViewSchedule.for_cache(self.plan.views, epochs=self.epochs, close=self.args.close_mosaic)

    def _model_train(self) -> None:
        super()._model_train()
        sampler = self.train_loader.sampler
        sampler.schedule = self._schedule()  # `time=` re-estimates the number of epochs while it runs
        sampler.set_epoch(self.epoch)
        if self.plan.losses:
            student = unwrap_model(self.model)
            student.kd_measure = True
            student.kd.set_epoch(self.epoch, self.epochs)

    def _close_dataloader_mosaic(self) -> None:
        """Do nothing: the schedule of views closes the mosaic."""

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        if self.plan.targets is not None:
            batch[TARGETS] = self.plan.decode(target_columns(batch, self.plan.targets.columns))
        return batch

    # -- model and optimizer ----------------------------------------------------------------------------------------

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        with readable("student", Path(str(self.args.model)), "--trust-student"):
            model: nn.Module = super().get_model(cfg, weights, verbose)
        names = tuple(str(self.data["names"][index]) for index in range(self.data["nc"]))
        # The data set's names: the model gets them later, and a checkpoint or YAML may bring others.
        levels = {tap.name for tap in self.plan.teacher.taps}
        layers = dict.fromkeys(name for spec in self.plan.losses for name in spec.student_layers if name not in levels)
        student = replace(describe_head(model, f"student {self.args.model}", layers=tuple(layers)), names=names)
        check_levels(self.plan.teacher, student)
        if not self.plan.losses:
            return model
        head = self.plan.head() if any("head" in spec.reads for spec in self.plan.losses) else None
        distiller = Distiller(self.plan.losses, self.plan.teacher, student, seed=self.args.seed, head=head)
        return attach_distiller(model, distiller)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Return the stock optimizer of the student with the adapters in groups of their own (never under Muon)."""
        student = unwrap_model(model)
        distiller = student._modules.pop("kd", None)
        try:
            optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        finally:
            if distiller is not None:
                student._modules["kd"] = distiller
        if distiller is not None:
            by_role = {group["param_group"]: group for group in optimizer.param_groups}
            for role, chosen in (("weight", True), ("bias", False)):
                members = [p for p in distiller.adapters() if (p.ndim > 1) is chosen]
                if members:
                    optimizer.add_param_group({**by_role[role], "params": members})
        return optimizer

    def optimizer_step(self) -> None:
        """Step as the stock trainer does, but clip student and adapters apart: jointly, adapters shrink the student."""
        self._watch_terms()  # before the step, which would spread what is not finite
        self.scaler.unscale_(self.optimizer)
        self._clip_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def _clip_gradients(self) -> None:
        student = unwrap_model(self.model)
        distiller = student._modules.get("kd")
        members = [parameter for name, parameter in student.named_parameters() if not name.startswith("kd.")]
        torch.nn.utils.clip_grad_norm_(members, max_norm=10.0)
        if isinstance(distiller, Distiller) and (adapters := distiller.adapters()):
            torch.nn.utils.clip_grad_norm_(adapters, max_norm=10.0)

    # -- what is said about it --------------------------------------------------------------------------------------

    def _watch_terms(self, *, flush: bool = False) -> None:
        """Hand the raw terms of recent batches to the alarms, several at once to spare the device a wait a step."""
        student = unwrap_model(self.model)
        if not isinstance(student, DistilledMixin):
            return
        if len(student.kd_seen) >= 10 or flush or self.device.type == "cpu":
            seen, student.kd_seen = student.kd_seen, []
            # Elsewhere steps may have been taken since the terms were computed, and have spread what is not finite.
            broken = student.kd.not_finite if self.device.type == "cpu" else lambda name: []
            for terms, finite, place in seen:
                values = {name: float(term) for name, term in terms.items()}
                self._watch.see(values, student_finite=bool(finite), place=place, broken=broken)

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        with full_disk_in_one_line(self.save_dir, self.last):
            super().save_metrics(metrics)
            self._save_shares()

    def _save_shares(self) -> None:
        """Add this epoch's rows to kd_gradients.csv."""
        student = unwrap_model(self.model)
        self._watch_terms(flush=True)
        shares: dict[str, float] | None = getattr(student, "kd_shares", None)
        if shares:
            weights: dict[str, float] = student.kd_weights
            self._watch.see_shares({name: share for name, share in shares.items() if weights[name]})
            log = self.save_dir / GRADIENTS
            head = "" if log.exists() else "epoch,term,share,weight\n"
            rows = "".join(
                f"{self.epoch + 1},{name},{share:.5f},{weights[name]:.6g}\n" for name, share in shares.items()
            )
            with log.open("a", encoding="utf-8") as file:
                file.write(head + rows)

    def plot_training_samples(self, batch: dict[str, Any], ni: int) -> None:
        """Draw the batch as the stock trainer does, the first one with the teacher's boxes, too."""
        if ni == 0 and self.plan.boxes is not None:
            keys = islice(self.train_loader.sampler, len(batch["img"]))
            drawn = draw_first_batch(
                self.save_dir / FIRST_BATCH, batch, [index for _, _, index in keys], self.plan.boxes
            )
            if drawn is not None:
                self.on_plot(drawn)
        super().plot_training_samples(batch, ni)

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        labelled = super().label_loss_items(loss_items, prefix)
        if prefix == "train":
            return labelled
        own = {f"{prefix}/{spec.name}_loss" for spec in self.plan.losses}
        if isinstance(labelled, list):
            return [name for name in labelled if name not in own]
        return {name: value for name, value in labelled.items() if name not in own}

    # -- files ------------------------------------------------------------------------------------------------------

    def _setup_train(self) -> None:
        try:
            with _one_line():
                super()._setup_train()
        except CacheKDError:
            self._discard()
            raise
        if RANK in {-1, 0}:
            write_atomic(self.save_dir / "cache_kd.yaml", to_yaml(dict(self.plan.record)).encode())

    def _check_trainable(self) -> None:
        """Refuse a student that is frozen whole, which Ultralytics overlooks while adapters can be trained."""
        named = unwrap_model(self.model).named_parameters()
        if not any(parameter.requires_grad for name, parameter in named if not name.startswith("kd.")):
            raise SettingError(
                f"freeze={self.args.freeze!r} leaves nothing of the student to train; freeze fewer layers"
            )

    def _discard(self) -> None:
        """Remove the run's folder, and those made for it, when the run is refused before its first epoch."""
        if self.resume or self.args.exist_ok:
            return
        shutil.rmtree(self.save_dir, ignore_errors=True)
        for folder in self._made:
            if any(folder.iterdir()):
                return
            folder.rmdir()

    def save_model(self) -> bool:
        """Write the adapters and the stock checkpoints beside the earlier ones, then rename them, the adapters last.

        Killed in between, there are two adapter files and resuming takes the one of last.pt's epoch.
        """
        distiller = unwrap_model(self.model)._modules.get("kd")
        sidecar = self.wdir / SIDECAR
        with full_disk_in_one_line(self.save_dir, self.last):
            if distiller is not None:
                write_tensors(next_to(sidecar), {"epoch": self.epoch, "state": distiller.state_dict()})
            with written_aside(self, "best", "last"):
                saved: bool = super().save_model()
            publish_next(sidecar)
        return saved

    def final_eval(self) -> None:
        with full_disk_in_one_line(self.save_dir, self.last), stripped_whole():
            super().final_eval()

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Go back to last.pt as the stock trainer does; raises `AlarmError` where it gives up."""
        try:
            recovered: bool = super()._handle_nan_recovery(epoch)
        except CacheKDError:
            raise
        except RuntimeError as error:
            raise AlarmError(
                f"the student's loss is not finite in epoch {epoch + 1}: {error}; train again with a lower lr0=…, or "
                f"amp=False, or --balance 0.3"
            ) from error
        return recovered

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        if ckpt is not None and self.resume and not 0 <= ckpt["epoch"] < self.epochs - 1:
            raise MismatchError(
                f"{self.last}: the run of {self.epochs} epochs is finished, there is nothing to resume; start a new "
                f"one from it: cache-kd train --student {self.last}"
            )
        super().resume_training(ckpt)
        if ckpt is not None and self.resume:
            drop_leftovers(self.wdir)
            for table in (Path(self.csv), self.save_dir / GRADIENTS):
                keep_epochs(table, self.start_epoch)

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        super()._load_checkpoint_state(ckpt)
        distiller = unwrap_model(self.model)._modules.get("kd")
        if distiller is None:
            return
        for name in (SIDECAR, SIDECAR + NEXT):
            file = self.wdir / name
            if file.exists():
                held = read_sidecar(file, self.device)
                if held["epoch"] == ckpt["epoch"]:
                    with _one_line():
                        distiller.load_state_dict(held["state"])
                    if file.suffix == NEXT:
                        publish_next(self.wdir / SIDECAR)
                    return
        raise MismatchError(
            f"{self.wdir / SIDECAR} does not hold the adapters of epoch {ckpt['epoch'] + 1}, at which "
            f"{self.last} stands; start a new run: cache-kd train --student {self.args.model}"
        )


def read_sidecar(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what an adapters' file holds, {epoch, state}, read as data whatever the student is trusted with.

    Raises:
        InputDataError: Not such a file, or one that names code.
    """
    try:
        held = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds here; all mean that these are no adapters
        named = ", ".join(checkpoint_globals(path) or []) or "nothing"
        raise InputDataError(
            f"{path} does not hold adapters as data (it names {named}); start a new run, its other files are no use"
        ) from error
    if not isinstance(held, dict) or type(held.get("epoch")) is not int or not isinstance(held.get("state"), dict):
        raise InputDataError(f"{path} does not hold adapters: expected an epoch and their state; start a new run")
    return held


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what Ultralytics raises while it prepares a run into an error of ours, of one line."""
    try:
        yield
    except CacheKDError:
        raise
    except (AssertionError, FileNotFoundError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(
            f"Ultralytics cannot start this run: {reason}; see its traceback: cache-kd --debug"
        ) from error


def check_device(device: object) -> None:
    """Raise `SettingError` unless `device` is one device that can be used here; None lets Ultralytics choose."""
    try:
        select_device("" if device is None else device, verbose=False)
    except (ValueError, RuntimeError):
        count = torch.cuda.device_count()
        seen = f"cpu, or one of the {count} GPUs that torch sees, as device=0" if count else "cpu; torch sees no GPU"
        raise SettingError(f"device={device} cannot be used here; allowed: {seen}") from None
    if device is not None and len(str(device).strip("[]()").split(",")) > 1:
        raise SettingError(f"device={device}: several devices are not supported; allowed: one, as device=0")


def check_levels(teacher: HeadSpec, student: HeadSpec) -> None:
    """Raise `MismatchError` unless both heads have the same feature levels."""
    strides = [[tap.stride for tap in head.taps] for head in (teacher, student)]
    if strides[0] != strides[1]:
        raise MismatchError(
            f"the student's head has strides {strides[1]}, the cache's targets have {strides[0]}; "
            "allowed: a student with the teacher's levels, as any YOLOv8, YOLO11, YOLO12 or YOLO26 detection model"
        )


def check_pixel_settings(settings: Mapping[str, Any], recipe: Recipe, imgsz: int) -> None:
    """Raise `SettingError` when a training setting would change the pixels that the targets belong to."""
    faults = [
        f"{key}={value!r} (the cache has {mine!r})" for key, (mine, value) in recipe.differences(settings).items()
    ]
    if "imgsz" in settings and settings["imgsz"] != imgsz:
        faults.append(f"imgsz={settings['imgsz']!r} (the cache has {imgsz})")
    for key, allowed in BATCH_PIXEL_KEYS.items():
        if key in settings and settings[key] not in allowed:
            faults.append(f"{key}={settings[key]!r} (allowed: {allowed[0]!r})")
    if settings.get("cache") == "disk":
        faults.append("cache='disk' (writes .npy files beside the images; allowed: ram, False)")
    if faults:
        raise SettingError(
            f"settings that change pixels are fixed by the cache: {', '.join(faults)}; leave them out, or run "
            "cache-kd extract again with them"
        )


def fixed_overrides(recipe: Recipe, imgsz: int) -> dict[str, Any]:
    """Return the settings of a run that the cache fixes, so that args.yaml says what was shown."""
    values = {key: value for key, value in recipe.to_json().items() if value is not None and key in RECIPE_KEYS}
    return {**values, "imgsz": imgsz, "multi_scale": 0.0, "rect": False}
