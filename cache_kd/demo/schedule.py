"""The sizes and settings of `cache-kd demo`, chosen so that it ends within three minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """What the demo trains, and for how long.

    Attributes:
        teacher, student: model YAMLs. imgsz: side of the drawn images in pixels.
        views, plain_views: what the cache holds of every training image.
        distilled: (name, losses) of each distilled student.
        training: Ultralytics settings that every arm shares. augmentation: the recipe of the views.
    """

    teacher: str = "yolov8n.yaml"
    student: str = "yolov8n.yaml"
    imgsz: int = 96
    images: int = 160
    val_images: int = 80
    teacher_epochs: int = 26
    student_epochs: int = 11
    close_mosaic: int = 2
    views: int = 4
    plain_views: int = 1
    distilled: tuple[tuple[str, tuple[str, ...]], ...] = (("cwd", ("cwd",)), ("ld + bckd", ("ld", "bckd")))
    augmentation: Mapping[str, Any] = field(default_factory=lambda: {"mosaic": 0.5, "scale": 0.3, "translate": 0.1})
    training: Mapping[str, Any] = field(
        default_factory=lambda: {
            "batch": 16,
            "nbs": 16,
            "optimizer": "AdamW",
            "lr0": 0.004,
            "lrf": 0.05,
            "warmup_epochs": 1,
            "warmup_bias_lr": 0.0,
            "amp": False,
            "deterministic": False,
            "cache": "ram",
            "workers": 0,
            "val": False,
            "plots": False,
            "verbose": False,
            "device": "cpu",
        }
    )


SCHEDULE = Schedule()
