"""In: class and box logits. Out: dense or sparse columns with a declared error bound; and back, in batches.

Both codecs store DFL logits minus their maximum per side: softmax does not see the shift, and the values become small.
With reg_max 1 box outputs are distances and stay as they are, in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from cache_kd.codecs.features import HALF_MAX, column_of, value_range
from cache_kd.errors import DamagedCacheError, MismatchError
from cache_kd.structures import Column

HEADER_BYTES = 4
CODE_MAX = 32767
SIDES = 4


@dataclass(frozen=True)
class LogitShape:
    """Anchors A, classes C and DFL bins R a side."""

    anchors: int
    classes: int
    reg_max: int

    @property
    def box_width(self) -> int:
        return SIDES * self.reg_max

    @property
    def index_bytes(self) -> int:
        return 2 if self.anchors <= 2**16 else 4

    @property
    def anchor_bytes(self) -> int:
        """Bytes of a sent anchor in a sparse row."""
        return self.index_bytes + 2 * (self.classes + self.box_width)

    @property
    def prefix_bytes(self) -> int:
        """Bytes of a sparse row before its first anchor: the count, and the tail of each class."""
        return HEADER_BYTES + 2 * self.classes


@dataclass(frozen=True)
class DecodedLogits:
    """scores (B, A, C), boxes (B, A, 4·R), sent (B, A) bool."""

    scores: Tensor
    boxes: Tensor
    sent: Tensor


class LogitCodec(Protocol):
    """Class and box logits ↔ columns."""

    kind: ClassVar[str]
    sends_all: ClassVar[bool]

    @property
    def step(self) -> float | None: ...

    def columns(self, shape: LogitShape) -> tuple[Column, ...]: ...

    def encode(
        self, scores: np.ndarray, boxes: np.ndarray, in_box: np.ndarray | None, shape: LogitShape
    ) -> dict[str, np.ndarray]: ...

    def decode(self, columns: Mapping[str, Tensor], shape: LogitShape) -> DecodedLogits: ...

    def describe(self) -> dict[str, Any]: ...


def check_shapes(scores: np.ndarray, boxes: np.ndarray, in_box: np.ndarray | None, shape: LogitShape) -> None:
    """Raise `MismatchError` unless scores are (A, C), boxes (A, 4·R) and in_box, where given, (A,)."""
    expected = ((shape.anchors, shape.classes), (shape.anchors, shape.box_width), (shape.anchors,))
    got = (scores.shape, boxes.shape, expected[2] if in_box is None else in_box.shape)
    if got != expected:
        raise MismatchError(
            f"scores, boxes and in_box have shapes {got}, the cache holds {expected}; "
            "extract with the teacher and the image size of this cache: cache-kd inspect CACHE"
        )


def shifted_boxes(boxes: np.ndarray, reg_max: int) -> np.ndarray:
    """Return float32 (n, 4·R) box logits minus their maximum per side; unchanged when reg_max is 1."""
    if reg_max == 1:
        return boxes
    sides = boxes.reshape(len(boxes), SIDES, reg_max)
    shifted: np.ndarray = (sides - sides.max(axis=2, keepdims=True)).reshape(boxes.shape)
    return shifted


@dataclass(frozen=True)
class DenseLogits:
    """Every anchor in half precision; bound: half a unit in the last place."""

    kind: ClassVar[str] = "dense"
    sends_all: ClassVar[bool] = True

    @property
    def step(self) -> float | None:
        return None

    def columns(self, shape: LogitShape) -> tuple[Column, ...]:
        return (
            Column("scores", "f2", (shape.anchors, shape.classes)),
            Column("boxes", "f2", (shape.anchors, shape.box_width)),
        )

    def encode(
        self, scores: np.ndarray, boxes: np.ndarray, in_box: np.ndarray | None, shape: LogitShape
    ) -> dict[str, np.ndarray]:
        check_shapes(scores, boxes, in_box, shape)
        value_range(scores, "class logits", HALF_MAX)
        value_range(boxes, "box logits", HALF_MAX)
        shifted = shifted_boxes(boxes, shape.reg_max)
        # a bin this far below its side's maximum has probability 0 either way
        return {"scores": scores.astype("<f2"), "boxes": shifted.clip(-HALF_MAX, HALF_MAX).astype("<f2")}

    def decode(self, columns: Mapping[str, Tensor], shape: LogitShape) -> DecodedLogits:
        scores = column_of(columns, "scores").float()
        sent = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
        return DecodedLogits(scores, column_of(columns, "boxes").float(), sent)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind}


@dataclass(frozen=True)
class SparseLogits:
    """Anchors whose best class passes the threshold, and all anchors in a labelled box; of the others the mean.

    A row: count u4; mean logit of the unsent anchors per class, fp16 (0 when all are sent); then as byte planes, low
    byte first, each with the sent anchors in order: indices (u2, or u4 beyond 65536 anchors), class codes (n, C), box
    codes (n, 4·R). A code is the logit over the step as int16, written as `differences`: mostly small, so that the
    high plane compresses away. With reg_max 1 the box planes are those of fp16 distances.

    Attributes:
        threshold: least probability, exclusive, of the best class of an anchor that is sent for its score.
        step: of the codes; bound: half a step, for sent anchors. A power of two makes the arithmetic exact.
    """

    threshold: float
    step: float = 0.125
    kind: ClassVar[str] = "sparse"
    sends_all: ClassVar[bool] = False

    def columns(self, shape: LogitShape) -> tuple[Column, ...]:
        return (Column("logits", "u1", (shape.prefix_bytes + shape.anchors * shape.anchor_bytes,), ragged=True),)

    def sent(self, scores: np.ndarray, in_box: np.ndarray | None) -> np.ndarray:
        """Return (A,) bool: which anchors are kept."""
        limit = np.float64(math.log(self.threshold) - math.log1p(-self.threshold))
        passing: np.ndarray = scores.max(axis=1) > limit
        return passing if in_box is None else passing | in_box

    def encode(
        self, scores: np.ndarray, boxes: np.ndarray, in_box: np.ndarray | None, shape: LogitShape
    ) -> dict[str, np.ndarray]:
        check_shapes(scores, boxes, in_box, shape)
        limit = self.step * CODE_MAX
        value_range(scores, "class logits", limit)
        value_range(boxes, "box logits", HALF_MAX if shape.reg_max == 1 else limit / 2)
        sent = self.sent(scores, in_box)
        count = int(np.count_nonzero(sent))
        tail = np.zeros(shape.classes)
        if count < shape.anchors:
            tail = scores[~sent].mean(axis=0, dtype=np.float64)
        kept = shifted_boxes(boxes[sent], shape.reg_max)
        parts = [
            np.array([count], "<u4").view(np.uint8),
            tail.clip(-HALF_MAX, HALF_MAX).astype("<f2").view(np.uint8),
            byte_planes(np.flatnonzero(sent).astype(f"<u{shape.index_bytes}")),
            byte_planes(differences(self._codes(scores[sent]), groups=1)),
            byte_planes(kept.astype("<f2") if shape.reg_max == 1 else differences(self._codes(kept), groups=SIDES)),
        ]
        return {"logits": np.concatenate(parts)}

    def _codes(self, logits: np.ndarray) -> np.ndarray:
        return np.rint(logits / np.float32(self.step)).astype("<i2")

    def decode(self, columns: Mapping[str, Tensor], shape: LogitShape) -> DecodedLogits:
        rows = column_of(columns, "logits")
        counts = sent_counts(rows, columns.get("logits_length"), shape)
        # a copy of its own starts at offset 0, which a view of another element size needs
        tail = rows[:, HEADER_BYTES : shape.prefix_bytes].clone(memory_format=torch.contiguous_format)
        planes = PlaneReader(rows, counts, shape.prefix_bytes)
        index = planes.integers(1, shape.index_bytes)
        codes = planes.integers(shape.classes, 2).view(-1, 1, shape.classes)
        scores_sent = undo_differences(codes, counts).float().mul_(self.step)
        codes = planes.integers(shape.box_width, 2).view(-1, SIDES, shape.reg_max)
        if shape.reg_max == 1:
            boxes_sent = codes.to(torch.int16).view(torch.float16).float()
        else:
            boxes_sent = undo_differences(codes, counts).float().mul_(self.step)
        batch = len(rows)
        base = torch.tensor([shape.anchors * number for number in range(batch)], device=rows.device)
        place = index.long() + base.repeat_interleave(torch.tensor(counts, device=rows.device), output_size=sum(counts))
        scores = tail.view(torch.float16).float()[:, None, :].repeat(1, shape.anchors, 1)
        boxes = torch.zeros(batch, shape.anchors, shape.box_width, device=rows.device)
        sent = torch.zeros(batch, shape.anchors, dtype=torch.bool, device=rows.device)
        scores.view(-1, shape.classes).index_copy_(0, place, scores_sent.view(-1, shape.classes))
        boxes.view(-1, shape.box_width).index_copy_(0, place, boxes_sent.view(-1, shape.box_width))
        sent.view(-1).index_fill_(0, place, True)
        return DecodedLogits(scores, boxes, sent)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "threshold": self.threshold, "step": self.step}


def byte_planes(values: np.ndarray) -> np.ndarray:
    """Return the bytes of little-endian integers or floats: all low bytes, then all next ones."""
    raw = np.ascontiguousarray(values).reshape(-1, 1).view(np.uint8)
    return np.ascontiguousarray(raw.T).reshape(-1)


def differences(codes: np.ndarray, groups: int) -> np.ndarray:
    """Return int16 codes (n, groups · K) as differences along K, then along the anchors, signs in the lowest bit.

    Neighbouring bins, classes and anchors resemble each other: box rows shrink by a third, those of 80 classes by a
    fifth. All arithmetic is modulo 2^16, so that no difference can overflow.
    """
    grouped = codes.reshape(len(codes), groups, codes.shape[1] // groups)
    change = np.diff(np.diff(grouped, axis=2, prepend=np.int16(0)), axis=0, prepend=np.int16(0))
    folded: np.ndarray = ((change << 1) ^ (change >> 15)).astype("<i2")
    return folded


def undo_differences(folded: Tensor, counts: list[int]) -> Tensor:
    """Return the int16 codes of `differences` of several samples, (N, groups, K); int32 in, N the sum of counts."""
    # modulo 2^16 all along; shifts of int32 are several times faster than those of int16
    change = ((folded >> 1) ^ -(folded & 1)).to(torch.int16)
    anchors = torch.cat([piece.cumsum(0, dtype=torch.int16) for piece in torch.split(change, counts)])
    return anchors.cumsum(2, dtype=torch.int16)


def sent_counts(rows: Tensor, lengths: Tensor | None, shape: LogitShape) -> list[int]:
    """Return how many anchors each sparse row holds; raises `DamagedCacheError` when its length does not fit."""
    header = rows[:, :HEADER_BYTES].long()
    weights = torch.tensor([1, 1 << 8, 1 << 16, 1 << 24], device=rows.device)
    counts = (header * weights).sum(dim=1)
    given = torch.full_like(counts, -1) if lengths is None else lengths.to(counts)
    # one transfer for both: on a GPU each would wait for the device
    pairs: list[list[int]] = torch.stack([counts, given], dim=1).tolist()
    for number, (count, length) in enumerate(pairs):
        needed = shape.prefix_bytes + count * shape.anchor_bytes
        if count > shape.anchors or needed > rows.shape[1] or length not in (-1, needed):
            raise DamagedCacheError(
                f"logits of sample {number} of the batch: a row of {rows.shape[1] if length < 0 else length} bytes "
                f"claims {count} of {shape.anchors} anchors ({needed} bytes); check the cache: cache-kd verify CACHE"
            )
    return [count for count, _ in pairs]


class PlaneReader:
    """Reads the byte planes of a batch of sparse rows in order, the samples' anchors one after the other."""

    def __init__(self, rows: Tensor, counts: list[int], start: int) -> None:
        self._rows = rows
        self._counts = counts
        self._starts = [start] * len(counts)

    def integers(self, width: int, size: int) -> Tensor:
        """Return the next field of all samples, flat: `width` integers an anchor, of `size` bytes, int32."""
        value = self._plane(width).int()
        for number in range(1, size):
            value += self._plane(width).int() << (8 * number)
        return value

    def _plane(self, width: int) -> Tensor:
        pieces = []
        for number, count in enumerate(self._counts):
            start = self._starts[number]
            self._starts[number] = start + count * width
            pieces.append(self._rows[number, start : self._starts[number]])
        return torch.cat(pieces)


LOGIT_CODECS: dict[str, type[DenseLogits | SparseLogits]] = {"dense": DenseLogits, "sparse": SparseLogits}
