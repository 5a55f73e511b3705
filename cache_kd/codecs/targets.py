"""In: a sample's targets. Out: the named columns of a view's row; and back, a batch of targets for the losses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_kd.codecs.features import Level
from cache_kd.codecs.fidelity import Fidelity
from cache_kd.codecs.fidelity import fidelity as preset
from cache_kd.codecs.logits import LogitShape
from cache_kd.errors import MismatchError, SettingError, choices
from cache_kd.structures import STORES, Column, HeadSpec, SampleTargets, TargetBatch

STORE_OF_NEED = {
    "features": "features",
    "score_map": "features",
    "logits": "logits",
    "hold_stats": "logits",
    "vlr": "vlr",
}
MAP = "map:"
"""A need that begins so is the map of one tap or layer."""


@dataclass(frozen=True)
class ViewCodec:
    """The codec of a cache: which columns its views have, how targets become rows and rows targets.

    Attributes:
        fidelity: parameters of every codec. store: which tiers are kept, of `STORES`; "vlr" has no columns of its own,
            it sends more anchors.
    """

    fidelity: Fidelity
    head: HeadSpec
    imgsz: int
    store: tuple[str, ...]

    @classmethod
    def create(cls, fidelity: str, head: HeadSpec, imgsz: int, store: Collection[str]) -> ViewCodec:
        """Return the codec of a preset; raises `SettingError` for an unknown preset or store."""
        for name in store:
            if name not in STORES:
                raise SettingError(f"--store {name!r} is unknown; {choices(name, STORES)}")
        if not store:
            raise SettingError(f"--store is empty; {choices('', STORES)}")
        if "vlr" in store and "logits" not in store:
            raise SettingError("--store vlr keeps the logits of more anchors; give it with them: --store logits,vlr")
        if head.layers and "features" not in store:
            raise SettingError("--taps keeps maps; give it with --store features or features,logits")
        return cls(preset(fidelity), head, imgsz, tuple(name for name in STORES if name in store))

    def describe(self) -> dict[str, Any]:
        """Return what the manifest records, enough for `from_description`."""
        return {
            **self.fidelity.describe(),
            "store": list(self.store),
            "layers": [tap.name for tap in self.head.layers],
        }

    @classmethod
    def from_description(cls, data: Mapping[str, Any], head: HeadSpec, imgsz: int) -> ViewCodec:
        return cls(Fidelity.from_description(data), head, imgsz, tuple(str(name) for name in data["store"]))

    @property
    def levels(self) -> tuple[Level, ...]:
        shapes = self.head.feature_shapes(self.imgsz)
        return tuple(Level(tap.name, shape) for tap, shape in zip(self.head.taps, shapes, strict=True))

    @property
    def layers(self) -> tuple[Level, ...]:
        """Name and shape of the maps beside the head's inputs."""
        return tuple(
            Level(tap.name, (tap.channels, self.imgsz // tap.stride, self.imgsz // tap.stride))
            for tap in self.head.layers
        )

    @property
    def logit_shape(self) -> LogitShape:
        return LogitShape(self.head.num_anchors(self.imgsz), self.head.num_classes, self.head.reg_max)

    @property
    def logit_step(self) -> float | None:
        """Step of the logit codes, whose half bounds the error of sent anchors; None for half precision."""
        return self.fidelity.logits.step

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(column for columns in self._columns_of_need().values() for column in columns)

    def _columns_of_need(self) -> dict[str, tuple[Column, ...]]:
        shape = self.logit_shape
        found: dict[str, tuple[Column, ...]] = {}
        if "features" in self.store:
            found["features"] = self.fidelity.features.columns(self.levels)
            found["score_map"] = (self.fidelity.score_map.column(shape.anchors),)
            for layer in self.layers:
                columns = self.fidelity.features.columns((layer,))
                found[MAP + layer.name] = tuple(replace(c, name=layer_column(layer.name, c.name)) for c in columns)
        if "logits" in self.store:
            found["logits"] = self.fidelity.logits.columns(shape)
            if self.head.hold_channels:
                found["hold_stats"] = (self.fidelity.hold_stats.column(self.head.hold_channels),)
        return found

    def missing(self, needs: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return (stores, layers) that a cache of this codec lacks to serve `needs`, and that an extraction could add.

        Raises:
            MismatchError: a need has a name that no target has.
        """
        stores, layers = set[str](), set[str]()
        for need in needs:
            name = need.removeprefix(MAP)
            if need not in STORE_OF_NEED and name == need:
                raise MismatchError(f"no target is called {need!r}; {choices(need, STORE_OF_NEED)}")
            if name != need and self.head.tap(name) is None:
                layers.add(name)
            stores.add(STORE_OF_NEED.get(need, "features"))
        if self.fidelity.logits.sends_all:
            stores.discard("vlr")
        return tuple(s for s in STORES if s in stores - set(self.store)), tuple(sorted(layers))

    def columns_for(
        self, needs: Collection[str], *, needed_by: str = "what reads them", command: str = "cache-kd extract ..."
    ) -> tuple[str, ...]:
        """Return the names of the columns to read, in the cache's order.

        Args:
            needs: of "features", "score_map", "logits", "hold_stats", "vlr", and "map:NAME" for one tap or layer.
            needed_by: the reader's name in an error. command: what extracted this cache, without --store and --taps.

        Raises:
            MismatchError: the cache was extracted without what is needed.
        """
        found = self._columns_of_need()
        stores, layers = self.missing(needs)
        if stores or layers:
            what = [*stores, *(f"the layer {name}" for name in layers)]
            store = [name for name in STORES if name in {*self.store, *stores}]
            taps = [*(tap.name for tap in self.head.layers), *layers]
            raise MismatchError(
                f"{needed_by} needs {' and '.join(what)}, and the cache was extracted with"
                f"{_options(self.store, [tap.name for tap in self.head.layers])}; a cache that has both old and new: "
                f"{command}{_options(store, taps)}"
            )
        if "hold_stats" in needs and "hold_stats" not in found:
            raise MismatchError(
                f"{needed_by} needs hold_stats and the teacher's head has no hold features; "
                "choose other losses: cache-kd losses"
            )
        wanted = {"features" if self._is_level(need) else "logits" if need == "vlr" else need for need in needs}
        return tuple(column.name for need, columns in found.items() if need in wanted for column in columns)

    def _is_level(self, need: str) -> bool:
        return need.removeprefix(MAP) in {tap.name for tap in self.head.taps}

    def encode(self, sample: SampleTargets) -> dict[str, np.ndarray]:
        """Return the row of every column; a ragged one as flat u8 of its own length.

        Raises:
            MismatchError: a target that this cache stores is missing or has another shape.
            AlarmError: a value is not finite or beyond what can be stored.
        """
        return self.encode_columns(sample, {column.name for column in self.columns})

    def encode_columns(self, sample: SampleTargets, wanted: Collection[str]) -> dict[str, np.ndarray]:
        """Return the row of some columns, see `encode`: all of a target's or none."""
        shape = self.logit_shape
        row: dict[str, np.ndarray] = {}
        if "features" in wanted:
            row.update(self.fidelity.features.encode(sample.features, self.levels))
        if "score_map" in wanted:
            score_map = _present(sample.score_map, "score_map", (shape.anchors,))
            row["score_map"] = self.fidelity.score_map.encode(score_map)
        for position, layer in enumerate(self.layers):
            if layer_column(layer.name, "features") in wanted:
                encoded = self.fidelity.features.encode(sample.layers[position : position + 1], (layer,))
                row.update({layer_column(layer.name, name): column for name, column in encoded.items()})
        if any(column.name in wanted for column in self.fidelity.logits.columns(shape)):
            scores = _present(sample.scores, "scores", (shape.anchors, shape.classes))
            boxes = _present(sample.boxes, "boxes", (shape.anchors, shape.box_width))
            row.update(self.fidelity.logits.encode(scores, boxes, sample.in_box, shape))
        if "hold_stats" in wanted:
            channels = (self.head.hold_channels,)
            mean = _present(sample.hold_mean, "hold_mean", channels)
            row["hold_stats"] = self.fidelity.hold_stats.encode(mean, _present(sample.hold_m2, "hold_m2", channels))
        return row

    def decode(self, columns: Mapping[str, Tensor]) -> TargetBatch:
        """Return the targets of a batch on the device of its columns.

        Args:
            columns: any of this codec's columns, each (B, ...); a ragged one as (B, L) u8 padded with anything, beside
                it `<name>_length` (B,), which is checked when given.

        Raises:
            MismatchError: a column came without the one that it is decoded with.
            DamagedCacheError: a ragged row does not fit its own header.
        """
        targets: dict[str, Any] = {}
        if "features" in columns:
            targets["features"] = self.fidelity.features.decode(columns, self.levels)
        targets["layers"] = self._decode_layers(columns)
        if "score_map" in columns:
            targets["score_map"] = self.fidelity.score_map.decode(columns["score_map"])
        if any(column.name in columns for column in self.fidelity.logits.columns(self.logit_shape)):
            logits = self.fidelity.logits.decode(columns, self.logit_shape)
            targets.update(scores=logits.scores, boxes=logits.boxes, sent=logits.sent)
        if "hold_stats" in columns:
            targets["hold_mean"], targets["hold_m2"] = columns["hold_stats"].unbind(dim=1)
        return TargetBatch(**targets)

    def _decode_layers(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        read = {layer: self._layer_columns(columns, layer) for layer in self.layers}
        return {layer.name: self.fidelity.features.decode(own, (layer,))[0] for layer, own in read.items() if own}

    def _layer_columns(self, columns: Mapping[str, Tensor], layer: Level) -> dict[str, Tensor]:
        """Return those of one layer that were read, by the names that the feature codec knows."""
        names = {c.name: layer_column(layer.name, c.name) for c in self.fidelity.features.columns((layer,))}
        return {name: columns[stored] for name, stored in names.items() if stored in columns}

    def decode_one(self, columns: Mapping[str, np.ndarray]) -> TargetBatch:
        """Return one sample's targets as a batch of 1, from rows as `encode` returns them or as they are read."""
        return self.decode({name: torch.from_numpy(np.array(row)[None]) for name, row in columns.items()})

    def feature_step(self, columns: Mapping[str, Tensor]) -> list[Tensor]:
        """Return per level the largest |error| that a value may have, broadcastable against (B, F, H, W)."""
        return self.fidelity.features.bounds(columns, self.levels)

    def layer_step(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same by name for the layers beside the head's inputs."""
        return {
            layer.name: self.fidelity.features.bounds(self._layer_columns(columns, layer), (layer,))[0]
            for layer in self.layers
        }


def _options(store: Sequence[str], taps: Sequence[str]) -> str:
    return f" --store {','.join(store)}" + (f" --taps {','.join(taps)}" if taps else "")


def layer_column(layer: str, column: str) -> str:
    """Return the name of a feature codec's column for one layer, as `C4.features`."""
    return f"{layer}.{column}"


def _present(values: np.ndarray | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 values; raises `MismatchError` when they are missing or have another shape."""
    if values is None or values.shape != shape:
        got = "nothing" if values is None else f"shape {values.shape}"
        raise MismatchError(
            f"targets of a sample: {name} must have shape {shape}, got {got}; "
            "compare the teacher with the cache: cache-kd inspect CACHE"
        )
    return values.astype(np.float32, copy=False)
