"""What travels between stages: views, the teacher's head, columns on disk, targets; shapes are checked once, here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cache_kd.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("mixed", "plain")
STORES = ("features", "logits", "vlr")


@dataclass(frozen=True, order=True)
class View:
    """One augmented version of every image: its kind ("mixed" or "plain") and its number, from 0."""

    kind: str
    number: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.number < 0:
            raise SettingError(
                f"no such view: {self.kind}:{self.number}; allowed: 3 (mixed) or plain:0, numbers from 0"
            )

    @property
    def name(self) -> str:
        """Folder name inside a cache, for example `mixed-0003`."""
        return f"{self.kind}-{self.number:04d}"

    @classmethod
    def parse(cls, text: str) -> View:
        """Return the view written as `3`, `mixed:3`, `plain:0` or `plain-0000`; raises `SettingError` otherwise."""
        match = re.fullmatch(r"(?:(mixed|plain)[:-])?(\d+)", text)
        if not match:
            raise SettingError(f"no such view: {text!r}; allowed: 3 (mixed) or plain:0, numbers from 0")
        return cls(match[1] or "mixed", int(match[2]))


@dataclass(frozen=True)
class Tap:
    """A layer whose output is a target: name (P3), channels F, stride in pixels."""

    name: str
    channels: int
    stride: int


@dataclass(frozen=True)
class HeadSpec:
    """What must be known of a detection head to store, read and compare its outputs.

    Attributes:
        taps: feature levels in the order of the head's inputs, P3 first.
        reg_max: DFL bins R a box side; 1 means that box outputs are distances, not distributions.
        names: class names; position is the class index.
        end2end: the head also has a one-to-one branch (YOLO26).
        hold: channels of each of the head's hold features (its maps before an activation): position 0 of every level,
            which is the head's input; then of each level the box branch's positions 1, 2, …, then the class branch's.
            Only the inputs for a head whose branches are built otherwise; empty: not described.
        layers: other layers whose outputs are targets, or are compared with targets.
    """

    taps: tuple[Tap, ...]
    reg_max: int
    names: tuple[str, ...]
    end2end: bool = False
    hold: tuple[int, ...] = ()
    layers: tuple[Tap, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def hold_channels(self) -> int:
        """Channels of all hold features in a row."""
        return sum(self.hold)

    @property
    def hold_positions(self) -> int:
        """Largest position in a branch at which there is a hold feature; 0 is the head's input."""
        levels = len(self.taps)
        return (len(self.hold) - levels) // (2 * levels) if self.hold else 0

    def hold_slot(self, level: int, branch: str, position: int) -> int:
        """Return the index in `hold` of a position of the "box" or "cls" branch of a level."""
        if position == 0:
            return level
        depth = self.hold_positions
        return len(self.taps) + level * 2 * depth + (depth if branch == "cls" else 0) + position - 1

    def tap(self, name: str) -> Tap | None:
        """Return the tap or layer of this name, None if there is none."""
        return next((tap for tap in (*self.taps, *self.layers) if tap.name == name), None)

    def grids(self, imgsz: int) -> tuple[tuple[int, int], ...]:
        """Return (H, W) of each level for square views of `imgsz` pixels, a multiple of the largest stride."""
        return tuple((imgsz // tap.stride, imgsz // tap.stride) for tap in self.taps)

    def feature_shapes(self, imgsz: int) -> tuple[tuple[int, int, int], ...]:
        """Return (F, H, W) of each level."""
        return tuple((tap.channels, *grid) for tap, grid in zip(self.taps, self.grids(imgsz), strict=True))

    def num_anchors(self, imgsz: int) -> int:
        """Return A, the anchors of all levels (one a cell)."""
        return sum(h * w for h, w in self.grids(imgsz))

    def to_json(self) -> dict[str, Any]:
        return {
            "taps": [[tap.name, tap.channels, tap.stride] for tap in self.taps],
            "reg_max": self.reg_max,
            "names": list(self.names),
            "end2end": self.end2end,
            "hold": list(self.hold),
            "layers": [[tap.name, tap.channels, tap.stride] for tap in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadSpec:
        return cls(
            taps=_taps(data["taps"]),
            reg_max=int(data["reg_max"]),
            names=tuple(str(name) for name in data["names"]),
            end2end=bool(data["end2end"]),
            hold=tuple(int(channels) for channels in data["hold"]),
            layers=_taps(data["layers"]),
        )


def _taps(rows: Sequence[Sequence[Any]]) -> tuple[Tap, ...]:
    return tuple(Tap(str(name), int(channels), int(stride)) for name, channels, stride in rows)


@dataclass(frozen=True)
class Column:
    """One array of a view on disk: `dtype` and `shape` of a sample's row.

    Attributes:
        ragged: rows are u8 of varying length up to `shape[0]`, zero-padded, with a length column beside them.
        whole: one chunk holds a whole shard (tiny columns); otherwise a chunk is one sample.
        typesize: bytes of an element as the compressor's byte shuffle sees it; 0 takes the dtype's.
        compressor: "zstd", or "lz4" for rows that are compressed already: it passes over them and their padding faster.
        expected: bytes that a ragged row is reckoned with when the samples of a shard are counted, 0 for none. Only who
            begins a cache needs it: the manifest records what came out.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ragged: bool = False
    whole: bool = False
    typesize: int = 0
    compressor: str = "zstd"
    expected: int = field(default=0, compare=False)

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


PIXEL_HASH = Column("pixel_hash", "u1", (8,), whole=True)
"""The proof that a target belongs to these pixels; stored by the loop itself, whatever the codec."""


@dataclass(frozen=True)
class SampleTargets:
    """The teacher's outputs for one view of one image, before the codec; float32 numpy arrays on the CPU.

    Attributes:
        features: one (F, H, W) map a level; empty when features are not stored.
        scores: (A, C) class logits; boxes: (A, 4·R) box logits, sides l, t, r, b; None when logits are not stored.
        score_map: (A,) largest class probability, of both heads' mean logits where there are two.
        hold_mean, hold_m2: (hold_channels,) mean and sum of squared deviations over the cells of each level.
        in_box: (A,) bool, anchors to keep whatever their score: the centre lies in a labelled box by the assigner's own
            rule or, with the store "vlr", the anchor belongs to LD's valuable localization region.
        layers: one (F, H, W) map for each of the head's `layers`.
    """

    features: tuple[np.ndarray, ...]
    scores: np.ndarray | None
    boxes: np.ndarray | None
    score_map: np.ndarray | None
    hold_mean: np.ndarray | None
    hold_m2: np.ndarray | None
    in_box: np.ndarray | None
    layers: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Labels:
    """The labelled boxes of a batch of views, all images in a row.

    Attributes:
        image: (M,) int64, index in the batch, ascending. cls: (M,) int64. boxes: (M, 4) xyxy in pixels of the view.
    """

    image: Tensor
    cls: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class TargetBatch:
    """Targets of a batch as losses read them: float32 tensors on one device; None for what was not read.

    Attributes:
        features: (B, F, H, W) a level. layers: (B, F, H, W) by name, of the other layers that were read.
        scores: (B, A, C) class logits. boxes: (B, A, 4·R), DFL logits minus their largest per side (R = 1: distances).
        sent: (B, A) bool; elsewhere scores hold the mean logit of what was left out and boxes are uniform.
        score_map: (B, A) largest class probability.
        hold_mean, hold_m2: (B, hold_channels).
        labels: the data set's boxes, classes as the student counts them.
    """

    features: tuple[Tensor, ...] | None = None
    scores: Tensor | None = None
    boxes: Tensor | None = None
    sent: Tensor | None = None
    score_map: Tensor | None = None
    hold_mean: Tensor | None = None
    hold_m2: Tensor | None = None
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Labels | None = None


@dataclass(frozen=True)
class Assignment:
    """Which anchors the student's own training loss gave to which labelled objects, without gradient.

    Attributes:
        positive: (B, A) bool. cls: (B, A) int64, class of the object; 0 elsewhere. quality: (B, A), the assigner's
            target score in 0..1 (class probability and overlap); 0 elsewhere.
    """

    positive: Tensor
    cls: Tensor
    quality: Tensor


@dataclass(frozen=True)
class DetectorOutput:
    """What a detection head saw and said, teacher or student, with gradient where the model has it.

    Attributes:
        features: the head's inputs, (B, F, H, W) a level. scores: (B, A, C) logits. boxes: (B, A, 4·R) logits.
        layers: (B, F, H, W) by name, of other layers that a loss compares.
        hold: the head's hold features (B, F, H, W) in the order of `HeadSpec.hold`; empty when no loss reads them.
        assigned: None when no loss reads it.
    """

    features: tuple[Tensor, ...]
    scores: Tensor
    boxes: Tensor
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    hold: tuple[Tensor, ...] = ()
    assigned: Assignment | None = None


@dataclass(frozen=True)
class Targets:
    """Targets of one view of one image, as `Cache.read` returns them; numpy, float32.

    Attributes:
        features: (F, H, W) a level. scores: (A, C) logits. boxes: (A, 4·R) logits. sent: (A,) bool.
        pixel_hash: blake2b-64 of the view's C-order (3, H, W) RGB uint8 bytes.
        layers: (F, H, W) by name, of the layers that `--taps` named.
    """

    features: tuple[np.ndarray, ...] | None
    scores: np.ndarray | None
    boxes: np.ndarray | None
    sent: np.ndarray | None
    pixel_hash: bytes
    layers: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ViewSample:
    """One view of one image: pixels (3, H, W) uint8 RGB; cls (n,) int; boxes (n, 4) xyxy in pixels of the view.

    `packed` holds the rows of the columns that keep the view itself; none unless views are packed.
    """

    pixels: np.ndarray
    cls: np.ndarray
    boxes: np.ndarray
    packed: Mapping[str, np.ndarray] = field(default_factory=dict)


class ViewDataset(Protocol):
    """A data set of which every item is a pure function of (view, index)."""

    def __len__(self) -> int: ...

    def sample(self, view: View, index: int) -> ViewSample: ...

    def image_name(self, index: int) -> str: ...


class FrozenHead(Protocol):
    """The teacher's head, rebuilt from a cache: passes gradient on, has none of its own."""

    def finish(self, level: int, branch: str, position: int, hold: Tensor) -> Tensor:
        """Return the logits (B, C, H, W) of the "cls" branch, or (B, 4·R, H, W) of the "box" branch, of a level.

        Args:
            position: 0 for the head's input, i for the map before the activation that follows the branch's i-th
                convolution. hold: that map, (B, F, H, W) with the teacher's channels.
        """
        ...


class TargetCodec(Protocol):
    """Targets ↔ named columns."""

    @property
    def columns(self) -> tuple[Column, ...]: ...

    def encode(self, sample: SampleTargets) -> dict[str, np.ndarray]: ...

    def decode(self, columns: Mapping[str, Tensor]) -> TargetBatch: ...
