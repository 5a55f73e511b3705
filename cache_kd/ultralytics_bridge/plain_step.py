"""In: views with labels. Out: the images a second of a plain training step of a small student."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils.ops import xyxy2xywh

from cache_kd.structures import ViewSample

STUDENT = "yolov8n.yaml"
STEPS = 2


def plain_step_rate(views: Sequence[ViewSample], classes: int, *, device: str) -> float:
    """Return images a second of forward, loss and backward of `STUDENT` on a batch of `views`, warmed up."""
    with torch.random.fork_rng(devices=[]):
        model = DetectionModel(yaml_model_load(STUDENT), nc=classes, verbose=False).to(device).train()
    model.args = get_cfg()
    size = views[0].pixels.shape[-1]
    batch = {
        "img": torch.stack([torch.from_numpy(view.pixels) for view in views]).to(device).float() / 255,
        "batch_idx": torch.cat([torch.full((len(view.cls),), float(number)) for number, view in enumerate(views)]),
        "cls": torch.cat([torch.from_numpy(view.cls).float().reshape(-1, 1) for view in views]),
        "bboxes": torch.cat([xyxy2xywh(torch.from_numpy(view.boxes).float()) / size for view in views]),
    }
    taken = []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        loss, _ = model(batch)
        loss.sum().backward()
        model.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return len(views) / min(taken[1:])
