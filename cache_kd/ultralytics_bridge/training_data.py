"""In: views and a cache reader. Out: training items that carry their targets, proven to belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from cache_kd.structures import View
from cache_kd.student.batch import stack, stack_columns
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.packed import PackedViews, RowReader
from cache_kd.views.seeding import item_seed, pixel_hash

FIRST_ITEMS = 48
SAMPLED = 64
"""`--verify-pixels first` checks the first 48 items that each process serves and one in 64 of all others."""


@dataclass(frozen=True)
class TargetSource:
    """Where an item's targets come from.

    Attributes:
        reader: The cache. columns: what the losses need. ragged: those of varying length. row_bytes: most bytes of an
            item's columns.
        verify: "first", "all" or "off". context: what to add when pixels differ, such as other library versions.
    """

    reader: RowReader
    columns: tuple[str, ...]
    ragged: frozenset[str]
    row_bytes: int
    verify: str
    context: str


class TrainingDataset(ViewDataset):
    """Items by (epoch, view, index), made from the source images, with their targets when a source is given."""

    def __init__(self, data: dict[str, Any], *, targets: TargetSource | None, **settings: Any) -> None:
        super().__init__(data, **settings)
        self._joined = TargetJoin(targets)

    def __getitem__(self, key: tuple[int, View, int]) -> dict[str, Any]:  # type: ignore[override]  # its loader asks by epoch
        return self._joined.complete(self.item(*key[1:]), key)

    @property
    def collate_fn(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The stock collation plus the columns of the targets."""
        return self._joined.collate


class PackedTrainingDataset(Dataset[dict[str, Any]]):
    """Items by (epoch, view, index) of a packed cache, with their targets when a source is given."""

    def __init__(self, views: PackedViews, *, targets: TargetSource | None) -> None:
        self._views, self._joined = views, TargetJoin(targets)

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, key: tuple[int, View, int]) -> dict[str, Any]:
        return self._joined.complete(self._views.item(*key[1:]), key)

    @property
    def labels(self) -> list[dict[str, Any]]:
        """The labels of the source images, at which Ultralytics looks before it trains."""
        return self._views.labels

    @property
    def collate_fn(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The stock collation plus the columns of the targets."""
        return self._joined.collate


class TargetJoin:
    """Adds to an item what a batch must know of it: epoch, view, targets, and whether its pixels were the teacher's."""

    def __init__(self, targets: TargetSource | None) -> None:
        self.targets = targets
        self.collate = Collate(targets.ragged if targets else frozenset())
        self._served = 0

    def complete(self, item: dict[str, Any], key: tuple[int, View, int]) -> dict[str, Any]:
        """Return the item of (epoch, view, index) with all that."""
        epoch, view, index = key
        item["kd_epoch"], item["kd_view"] = epoch, view
        if self.targets is not None:
            item["kd_rows"] = self.targets.reader.read(view, index, self.targets.columns)
            item["kd_checked"] = self._due(self.targets.verify, epoch, view, index)
            if item["kd_checked"]:
                item["kd_fault"] = self._fault(self.targets, item, view, index)
        return item

    def _due(self, verify: str, epoch: int, view: View, index: int) -> bool:
        """Return whether the pixels of the next item are to be checked."""
        self._served += 1
        sampled = item_seed(epoch, view, index) % SAMPLED == 0
        return verify == "all" or (verify == "first" and (self._served <= FIRST_ITEMS or sampled))

    def _fault(self, targets: TargetSource, item: Mapping[str, Any], view: View, index: int) -> str | None:
        """Return what is wrong with the pixels of an item, or None."""
        stored = targets.reader.read(view, index, ("pixel_hash",))["pixel_hash"].tobytes()
        found = pixel_hash(item["img"].numpy())
        if stored == found:
            return None
        return (
            f"view {view.name} of item {index} ({item['im_file']}) has other pixels than the teacher saw: "
            f"hash {found.hex()}, stored {stored.hex()}; {targets.context}; "
            "check all of them: cache-kd verify CACHE --pixels"
        )


@dataclass(frozen=True)
class Collate:
    """Joins items into a batch that says its epoch and view."""

    ragged: frozenset[str]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        epochs = {(item.pop("kd_epoch"), item.pop("kd_view")) for item in items}
        rows: list[Mapping[str, np.ndarray]] = [item.pop("kd_rows", {}) for item in items]
        faults = [item.pop("kd_fault", None) for item in items]
        checked = sum(item.pop("kd_checked", False) for item in items)
        pixels = stack([item.pop("img") for item in items])
        batch: dict[str, Any] = {**ViewDataset.collate_fn(items), "img": pixels}
        if len(epochs) != 1:
            raise AssertionError(f"one batch from several epochs: {epochs}")
        batch["kd_epoch"], batch["kd_view"] = epochs.pop()
        batch["kd_checked"] = (checked, len(items))
        batch["kd_fault"] = next((fault for fault in faults if fault), None)
        return {**batch, **(stack_columns(rows, self.ragged) if rows[0] else {})}
