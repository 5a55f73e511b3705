"""In: Ultralytics settings and a plan of distillation. Out: the stock trainer's run with stored targets in its loss."""

from __future__ import annotations

import logging
import shlex
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG, RANK
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.cache.files import write_atomic
from cache_kd.config import to_yaml
from cache_kd.errors import AlarmError, CacheKDError, MismatchError, SettingError
from cache_kd.losses.ranks import of_the_first, summed
from cache_kd.student.batch import target_columns
from cache_kd.student.distiller import Distiller
from cache_kd.student.loader import ViewSampler
from cache_kd.student.schedule import ViewSchedule
from cache_kd.ultralytics_bridge.adapters import add_adapters, clip_apart, distiller_of, without_distiller
from cache_kd.ultralytics_bridge.first_batch import NAME as FIRST_BATCH
from cache_kd.ultralytics_bridge.first_batch import draw_first_batch
from cache_kd.ultralytics_bridge.gate import readable
from cache_kd.ultralytics_bridge.heads import check_levels, describe_head
from cache_kd.ultralytics_bridge.plan import DistillPlan
from cache_kd.ultralytics_bridge.run_files import (
    drop_leftovers,
    full_disk_in_one_line,
    keep_epochs,
    next_to,
    publish_next,
    sidecar_of,
    stripped_whole,
    write_tensors,
    written_aside,
)
from cache_kd.ultralytics_bridge.scan import validation_set
from cache_kd.ultralytics_bridge.settings import check_device, one_line
from cache_kd.ultralytics_bridge.stream import TrainingSet, training_loader, training_set
from cache_kd.ultralytics_bridge.student import TARGETS, attach_distiller
from cache_kd.ultralytics_bridge.watch import GRADIENTS, StepWatch

LOG = logging.getLogger(__name__)
SIDECAR = "kd_last.pt"
RECORD = "cache_kd.yaml"
"""What a run was made of, in its folder from the moment on at which it can begin."""


class DistillTrainer(DetectionTrainer):
    """Ultralytics' detection trainer on the views of a cache.

    EMA, checkpoints, validation, callbacks, AMP and resuming are the stock trainer's. Adapters are in the optimizer, in
    parameter groups of their own, and in a sidecar file beside last.pt. On several devices there is one of it in every
    process and one, whose `ddp` is true, in the process that launches them; files are the first process's.
    """

    def __init__(
        self, plan: DistillPlan, overrides: dict[str, Any], _callbacks: Any = None, *, cfg: Any = DEFAULT_CFG
    ) -> None:
        self.plan = plan
        self.epochs: int
        workers = overrides.get("workers")
        check_device(overrides.get("device"))
        project = Path(overrides["project"])
        self._made = [folder for folder in (project, *project.parents) if not folder.exists()]
        with one_line():
            super().__init__(cfg, overrides, _callbacks)
        if self.device.type == "cpu" and workers:
            self.args.workers = workers  # Ultralytics sets 0 on the CPU even where the user asked for some
        if self.args.compile and plan.losses:
            LOG.warning("compile=%s is switched off: torch.compile is untested with distillation", self.args.compile)
            self.args.compile = False
        self._dataset: TrainingSet | None = None
        self._watch = StepWatch(shlex.quote(str(plan.record.get("cache", "CACHE"))))

    @property
    def leads(self) -> bool:
        """Whether this process trains and writes the run's files."""
        return RANK in {-1, 0} and not self.ddp

    # -- data -------------------------------------------------------------------------------------------------------

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        stride = max(int(unwrap_model(self.model).stride.max()), 32)
        if mode != "train":
            return validation_set(self.args, img_path, batch=batch, data=self.data, mode=mode, stride=stride)
        if self._dataset is None:
            cache, others = self.args.cache, not self.leads
            self._dataset = training_set(self.plan, self.data, cache=cache, stride=stride, proven=others)
        return self._dataset

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        if mode != "train":
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        self._check_trainable()  # the first step after freezing layers
        dataset = self.build_dataset(dataset_path, mode, batch_size)
        return training_loader(
            self.plan,
            dataset,
            ViewSampler(
                len(dataset),
                self._schedule(),
                seed=self.args.seed,
                rank=max(RANK, 0),
                world=self._world,
                window=self.plan.window,
            ),
            batch_size=batch_size,
            workers=self.args.workers,
            processes=self._world,
            cache=self.args.cache,
            pinned=self.device.type == "cuda",
        )

    @property
    def _world(self) -> int:
        return max(int(self.world_size), 1)

    def _schedule(self) -> ViewSchedule:
        return ViewSchedule.for_cache(self.plan.views, epochs=self.epochs, close=self.args.close_mosaic)

    def _get_warmup_iterations(self, num_batches: int) -> int:
        if self.args.time:
            # Re-estimated by each process from its own clock; other epochs would be other views and learning rates.
            self.epochs = self.args.epochs = int(of_the_first(self.epochs, self.device))
        return int(super()._get_warmup_iterations(num_batches))

    def _model_train(self) -> None:
        self._watch.see(self.model, at_once=True)  # what is left of the epoch before
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
        with without_distiller(model) as distiller:
            optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        if distiller is not None:
            add_adapters(optimizer, distiller)
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
        clip_apart(self.model)

    # -- what is said about it --------------------------------------------------------------------------------------

    def _watch_terms(self) -> None:
        self._watch.see(self.model, at_once=self.device.type == "cpu")

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        with full_disk_in_one_line(self.save_dir, self.last):
            super().save_metrics(metrics)
            self._watch.save_shares(self.model, self.save_dir, self.epoch)

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
            with one_line():
                super()._setup_train()
        except CacheKDError:
            if RANK == -1:
                self.discard()
            raise
        summed(torch.zeros(1, device=self.device))  # the record says that every process has got so far
        if self.leads:
            write_atomic(self.save_dir / RECORD, to_yaml(dict(self.plan.record)).encode())

    def _check_trainable(self) -> None:
        """Refuse a student that is frozen whole, which Ultralytics overlooks while adapters can be trained."""
        named = unwrap_model(self.model).named_parameters()
        if not any(parameter.requires_grad for name, parameter in named if not name.startswith("kd.")):
            raise SettingError(
                f"freeze={self.args.freeze!r} leaves nothing of the student to train; freeze fewer layers"
            )

    def discard(self) -> None:
        """Remove the run's folder, and those made for it, when the run was refused before its first epoch."""
        if self.resume or self.args.exist_ok or (self.save_dir / RECORD).exists():
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
        distiller = distiller_of(self.model)
        sidecar = self.wdir / SIDECAR
        with full_disk_in_one_line(self.save_dir, self.last):
            if distiller is not None:
                write_tensors(next_to(sidecar), {"epoch": self.epoch, "state": distiller.state_dict()})
            with written_aside(self, "best", "last"):
                saved: bool = super().save_model()
            publish_next(sidecar)
        return saved

    def final_eval(self) -> None:
        self._watch.see(self.model, at_once=True)
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
        if ckpt is not None and self.resume and self.leads:
            drop_leftovers(self.wdir)
            for table in (Path(self.csv), self.save_dir / GRADIENTS):
                keep_epochs(table, self.start_epoch)

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        super()._load_checkpoint_state(ckpt)
        distiller = distiller_of(self.model)
        if distiller is None:
            return
        found = sidecar_of(self.wdir / SIDECAR, ckpt["epoch"], self.device)
        if found is None:
            raise MismatchError(
                f"{self.wdir / SIDECAR} does not hold the adapters of epoch {ckpt['epoch'] + 1}, at which "
                f"{self.last} stands; start a new run: cache-kd train --student {self.args.model}"
            )
        file, state = found
        with one_line():
            distiller.load_state_dict(state)
        summed(torch.zeros(1, device=self.device))  # all have read it before it is renamed
        if file != self.wdir / SIDECAR and self.leads:
            publish_next(self.wdir / SIDECAR)
