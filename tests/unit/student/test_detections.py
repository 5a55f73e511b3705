"""Boxes are decoded from logits by hand-computed cases: places, levels, scores, suppression, what was not sent."""

from __future__ import annotations

import math

import torch

from cache_kd.structures import HeadSpec, Tap
from cache_kd.student.detections import Detections, anchor_boxes, count_found, detections

IMGSZ = 32
BINS = HeadSpec(taps=(Tap("P3", 4, 8), Tap("P4", 4, 16)), reg_max=4, names=("a", "b"))
DISTANCES = HeadSpec(taps=(Tap("P3", 4, 8), Tap("P4", 4, 16)), reg_max=1, names=("a", "b"))
ANCHORS = 16 + 4


def quiet_scores() -> torch.Tensor:
    return torch.full((ANCHORS, 2), -9.0)


def sharp(*bins: int) -> torch.Tensor:
    """Return the (16,) logits of one anchor whose four sides are these bins with certainty."""
    logits = torch.full((4, 4), -1e4)
    logits[range(4), list(bins)] = 1e4
    return logits.flatten()


def test_a_box_is_the_anchor_and_its_distances_in_cells_of_its_level() -> None:
    logits = torch.zeros(ANCHORS, 16)
    logits[1 * 4 + 2] = sharp(1, 0, 3, 2)  # P3, row 1, column 2: centre (20, 12)
    logits[16 + 3] = sharp(1, 1, 0, 2)  # P4, row 1, column 1: centre (24, 24)
    boxes = anchor_boxes(logits, BINS, IMGSZ)
    assert boxes[1 * 4 + 2].tolist() == [12, 12, 44, 28]
    assert boxes[16 + 3].tolist() == [8, 8, 24, 56]
    # equal logits: the mean bin 1.5 on every side
    assert boxes[0].tolist() == [4 - 12, 4 - 12, 4 + 12, 4 + 12]


def test_distances_of_a_head_without_bins_are_taken_as_they_are() -> None:
    logits = torch.zeros(ANCHORS, 4)
    logits[16 + 1] = torch.tensor([0.5, -0.25, 1.5, 1.0])  # P4, row 0, column 1: centre (24, 8)
    assert anchor_boxes(logits, DISTANCES, IMGSZ)[16 + 1].tolist() == [16, 12, 48, 24]


def test_threshold_suppression_and_order() -> None:
    scores, boxes = quiet_scores(), torch.ones(ANCHORS, 4)
    boxes[16:] = 0.5  # squares of 16 px about each centre on both levels
    logit = math.log(0.6 / 0.4)
    scores[5, 0], scores[6, 0], scores[16 + 3, 1] = logit, 3.0, 1.0
    scores[0, 1] = math.log(0.24 / 0.76)  # below the threshold
    boxes[6] = torch.tensor([2.0, 1.0, 0.0, 1.0])  # the very box of anchor 5
    said = detections(scores, boxes, DISTANCES, IMGSZ)
    assert said.cls.tolist() == [0, 1]
    torch.testing.assert_close(said.scores, torch.tensor([3.0, 1.0]).sigmoid())
    assert said.boxes.tolist() == [[4, 4, 20, 20], [16, 16, 32, 32]]
    # another class is never suppressed
    scores[5, 1] = 1.5
    assert sorted(detections(scores, boxes, DISTANCES, IMGSZ).cls.tolist()) == [0, 1, 1]


def test_anchors_that_were_not_sent_say_nothing() -> None:
    scores, boxes = quiet_scores(), torch.ones(ANCHORS, 4)
    scores[2, 0] = scores[9, 0] = 4.0
    sent = torch.ones(ANCHORS, dtype=torch.bool)
    assert len(detections(scores, boxes, DISTANCES, IMGSZ, sent=sent)) == 2
    sent[9] = False
    assert detections(scores, boxes, DISTANCES, IMGSZ, sent=sent).boxes.tolist() == [[12, -4, 28, 12]]
    assert len(detections(quiet_scores(), boxes, DISTANCES, IMGSZ)) == 0


def some(boxes: list[list[float]], cls: list[int]) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.ones(len(cls)), torch.tensor(cls, dtype=torch.int64))


def test_a_label_is_found_once_by_its_own_class() -> None:
    square = [0.0, 0.0, 10.0, 10.0]
    half = [0.0, 0.0, 10.0, 4.9]
    labels = some([square, [20.0, 0.0, 30.0, 10.0]], [0, 1])
    assert count_found(labels, some([square, square], [0, 0])) == 1
    assert count_found(labels, some([square], [1])) == 0
    assert count_found(labels, some([half], [0])) == 0
    assert count_found(labels, some([[20.0, 0.0, 30.0, 10.0], square], [1, 0])) == 2
    assert count_found(labels, some([], [])) == count_found(some([], []), labels) == 0
