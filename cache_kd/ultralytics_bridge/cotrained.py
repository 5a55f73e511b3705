"""In: a student and a teacher that is trained beside it. Out: Ultralytics' run, the student taught by what it says now.

This is what articles call online distillation when both networks learn; a live teacher that is frozen is Ultralytics'
own `distill_model=`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.errors import MismatchError
from cache_kd.losses import LossSpec
from cache_kd.structures import TargetBatch
from cache_kd.ultralytics_bridge.adapters import MAX_NORM
from cache_kd.ultralytics_bridge.heads import describe_head, detector_output, score_map
from cache_kd.ultralytics_bridge.plan import DistillPlan
from cache_kd.ultralytics_bridge.run_files import (
    full_disk_in_one_line,
    next_to,
    publish_next,
    sidecar_of,
    write_tensors,
)
from cache_kd.ultralytics_bridge.settings import check_one_device
from cache_kd.ultralytics_bridge.student import TARGETS
from cache_kd.ultralytics_bridge.teacher import Checkpoint
from cache_kd.ultralytics_bridge.trainer import DistillTrainer
from cache_kd.views.recipe import Recipe

SIDECAR = "teacher_last.pt"


class CotrainedTrainer(DistillTrainer):
    """Trains teacher and student in the same steps, on Ultralytics' own loader.

    In each step the teacher, in training mode and with the weights of its checkpoint at first, sees the batch; its own
    detection loss trains it, by the same optimizer with the settings of the run; the student's loss compares with what
    the teacher said, which passes no gradient back. Gradients of student, adapters and teacher are clipped apart. The
    teacher is part of no checkpoint of the student; a file beside last.pt holds it for resuming.
    """

    def __init__(self, checkpoint: Checkpoint, losses: tuple[LossSpec, ...], overrides: dict[str, Any]) -> None:
        check_one_device(overrides.get("device"), "a run beside a teacher that learns")
        self.teacher_file = checkpoint.path
        self.teacher: Any = checkpoint.model.float()
        self.forwards = 0
        super().__init__(live_plan(checkpoint, losses, overrides), overrides)

    # The stock loader instead of a cache's.

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        if mode != "train":
            return super().build_dataset(img_path, mode, batch)
        return DetectionTrainer.build_dataset(self, img_path, mode, batch)

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        if mode == "train":
            self._check_trainable()
        return DetectionTrainer.get_dataloader(self, dataset_path, batch_size, rank, mode)

    def _close_dataloader_mosaic(self) -> None:
        DetectionTrainer._close_dataloader_mosaic(self)

    def _model_train(self) -> None:
        DetectionTrainer._model_train(self)
        self.teacher.train()
        student = unwrap_model(self.model)
        student.kd_measure = True
        student.kd.set_epoch(self.epoch, self.epochs)

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model = super().get_model(cfg, weights, verbose)
        names = tuple(str(self.data["names"][index]) for index in range(self.data["nc"]))
        if names != self.plan.teacher.names:
            raise MismatchError(
                f"teacher {self.teacher_file} knows the classes {', '.join(self.plan.teacher.names[:5])}, the data set "
                f"has {', '.join(names[:5])}; allowed: a teacher of the same classes, which its own loss can train"
            )
        return model

    # The teacher's part of a step.

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = DetectionTrainer.preprocess_batch(self, batch)
        if unwrap_model(self.model).training:
            batch[TARGETS] = self._teach(batch)
        return batch

    def _teach(self, batch: dict[str, Any]) -> TargetBatch:
        """Take one backward pass of the teacher's own loss and return what it said of the batch."""
        outputs = self.teacher(batch["img"])
        loss, _ = self.teacher.loss(batch, outputs)
        # Before the student's: the two share no tensor, and gradients wait for the same step of the optimizer.
        self.scaler.scale(loss.sum()).backward()
        self.forwards += len(batch["img"])
        said = detector_output(outputs)
        return TargetBatch(
            features=tuple(level.detach().float() for level in said.features), score_map=score_map(outputs).detach()
        )

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Return the optimizer of student and adapters with the teacher in groups as the stock trainer makes them."""
        optimizer = super().build_optimizer(model, *args, **kwargs)
        self.teacher.to(self.device).requires_grad_(True)
        self.teacher.model[-1].dfl.requires_grad_(False)  # fixed numbers, as the stock trainer freezes them
        self.teacher.args, self.teacher.criterion = self.args, None
        for group in DetectionTrainer.build_optimizer(self, self.teacher, *args, **kwargs).param_groups:
            optimizer.add_param_group(group)
        return optimizer

    def _clip_gradients(self) -> None:
        super()._clip_gradients()
        torch.nn.utils.clip_grad_norm_(self.teacher.parameters(), max_norm=MAX_NORM)

    # Its file.

    def save_model(self) -> bool:
        file = self.wdir / SIDECAR
        with full_disk_in_one_line(self.save_dir, self.last):
            write_tensors(next_to(file), {"epoch": self.epoch, "state": self.teacher.state_dict()})
            saved = super().save_model()
            publish_next(file)
        return saved

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        super()._load_checkpoint_state(ckpt)
        found = sidecar_of(self.wdir / SIDECAR, ckpt["epoch"], self.device)
        if found is None:
            raise MismatchError(f"{self.wdir / SIDECAR} does not hold the teacher of epoch {ckpt['epoch'] + 1}")
        file, state = found
        self.teacher.load_state_dict(state)
        if file != self.wdir / SIDECAR:
            publish_next(self.wdir / SIDECAR)


def live_plan(checkpoint: Checkpoint, losses: tuple[LossSpec, ...], overrides: Mapping[str, Any]) -> DistillPlan:
    """Return the plan of a run that reads no cache: its targets are what the teacher says in each step."""

    def none(*_: object) -> NoReturn:
        raise AssertionError("a run beside its teacher reads no cache")

    return DistillPlan(
        losses=losses,
        views=(),
        recipe=Recipe.from_settings(overrides),
        imgsz=int(overrides["imgsz"]),
        seed=int(overrides.get("seed", 0)),
        teacher=describe_head(checkpoint.model, f"teacher {checkpoint.path}"),
        targets=None,
        decode=none,
        head=none,
        check_data=none,
        record={"teacher": {"file": checkpoint.path.name}, "losses": [str(spec) for spec in losses]},
    )
