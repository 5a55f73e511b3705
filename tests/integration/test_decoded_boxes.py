"""Boxes that are decoded from raw logits are those of Ultralytics' own head and suppression, for every kind of head."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import torch
from small_inputs import build_model
from torch import Tensor, nn
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xywh2xyxy

from cache_kd.student.detections import OVERLAP, THRESHOLD, anchor_boxes, detections
from cache_kd.ultralytics_bridge.heads import describe_head, detector_output
from cache_kd.ultralytics_bridge.teacher import load_teacher

IMGSZ = 320


def model_of(kind: str, weights: Path) -> nn.Module:
    if kind == "yolo26":
        model = build_model("yolo26n.yaml").eval()
        head = model.model[-1]
        head.end2end = False  # the branch that is stored
        for branch in (*head.cv2, *head.cv3):  # random weights shout: every probability would be 0 or 1
            branch[-1].weight.data /= 300
            branch[-1].bias.data /= 300
        return model
    return load_teacher(weights / {"yolov8": "yolov8s-bccd.pt", "yolo11": "yolo11n-int8deq.pt"}[kind]).model


def image_of(folder: Path) -> Tensor:
    """Return the first image of a folder, (1, 3, IMGSZ, IMGSZ) RGB in 0..1."""
    picture = cv2.resize(cv2.imread(str(sorted(folder.iterdir())[0])), (IMGSZ, IMGSZ))
    return torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(("kind", "reg_max"), [("yolov8", 16), ("yolo11", 16), ("yolo26", 1)])
def test_boxes_are_those_of_ultralytics(test_data: Path, kind: str, reg_max: int) -> None:
    model = model_of(kind, test_data / "weights")
    data = "bccd" if kind == "yolov8" else "coco128"
    image = image_of(next((test_data / "data" / data / "images").glob("train*")))
    with torch.inference_mode():
        outputs = model(image)
    head, raw, decoded = describe_head(model, kind), detector_output(outputs), outputs[0]
    assert head.reg_max == reg_max and head.end2end is (kind == "yolo26")
    boxes = anchor_boxes(raw.boxes[0], head, IMGSZ)
    torch.testing.assert_close(boxes, xywh2xyxy(decoded[0, :4].T), atol=1e-3, rtol=1e-4)
    # Random weights are sure of nothing: there the threshold lets the best tenth pass.
    scores = raw.scores[0].sigmoid().amax(1)
    threshold = float(scores.quantile(0.9)) if kind == "yolo26" else THRESHOLD
    said = detections(raw.scores[0], raw.boxes[0], head, IMGSZ, threshold=threshold)
    (expected,) = non_max_suppression(decoded.clone(), threshold, OVERLAP)
    assert len(said) == len(expected) > 1
    torch.testing.assert_close(said.scores, expected[:, 4], atol=1e-5, rtol=0)
    torch.testing.assert_close(said.boxes, expected[:, :4], atol=2e-3, rtol=1e-4)
    assert said.cls.tolist() == expected[:, 5].int().tolist()
