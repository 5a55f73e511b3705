"""In: the first batch of a training. Out: a picture of it with labels and teacher's boxes, beside Ultralytics' own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cache_kd.errors import CacheKDError
from cache_kd.report.box_pictures import Cell, sheet
from cache_kd.report.canvas import BoxLayer
from cache_kd.structures import View
from cache_kd.student.detections import Detections
from cache_kd.ultralytics_bridge.student import batch_labels

LOG = logging.getLogger(__name__)
NAME = "train_batch0_teacher.jpg"
SHOWN = 16
"""Views on the picture, as many as on Ultralytics' own."""
TeacherBoxes = Callable[[View, int], Detections]
"""Returns the boxes that a cache's logits say of the view of an item."""


def draw_first_batch(path: Path, batch: Mapping[str, Any], indices: Sequence[int], boxes: TeacherBoxes) -> Path | None:
    """Draw a prepared batch; the batch stays as it is and no random number is drawn.

    Args:
        batch: what the student was shown, before Ultralytics draws it: that writes into its images.
        indices: the batch's items, in order.

    Returns:
        The file, or None where it could not be drawn: a warning says why, the training goes on.
    """
    images, labels = batch["img"][:SHOWN], batch_labels(batch)
    pixels = (images.detach().float() * 255).round().to("cpu", torch.uint8).numpy()
    truth, owner = labels.boxes.cpu().numpy(), labels.image.cpu().numpy()
    try:
        cells = [
            Cell(
                f"{Path(batch['im_file'][row]).name}",
                pixels[row],
                (
                    BoxLayer("labels", truth[owner == row]),
                    BoxLayer("teacher", boxes(batch["kd_view"], indices[row]).boxes.numpy()),
                ),
            )
            for row in range(len(pixels))
        ]
        title = f"first batch, view {batch['kd_view'].name}: labels, and what the teacher says of the same pixels"
        return sheet(path, title, cells)
    except (OSError, CacheKDError) as error:
        LOG.warning("%s was not drawn: %s", path, error)
        return None
