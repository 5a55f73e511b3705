"""In: the columns of single samples. Out: tensors of a batch under flat keys, ready to be moved to the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

PREFIX = "kd_"
"""Keys of the batch mapping that belong to distillation; Ultralytics moves top-level tensors only."""


def stack(rows: Sequence[np.ndarray | Tensor]) -> Tensor:
    """Return rows of equal shape as one tensor (B, …), in a loader's worker in shared memory.

    Torch's own collation writes there at once; a tensor elsewhere is copied once more when it is sent.
    """
    stacked: Tensor = default_collate(list(rows))
    return stacked


def stack_columns(rows: Sequence[Mapping[str, np.ndarray]], ragged: Collection[str]) -> dict[str, Tensor]:
    """Return {prefixed column: (B, …) tensor}; ragged columns are padded to the longest, with a length beside them."""
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in ragged:
            lengths = [len(value) for value in values]
            padded = np.zeros((len(values), max(lengths)), dtype=np.uint8)
            for target, value in zip(padded, values, strict=True):
                target[: len(value)] = value
            batch[f"{PREFIX}{name}_length"] = torch.tensor(lengths)
            values = list(padded)
        batch[PREFIX + name] = stack(values)
    return batch


def target_columns(batch: Mapping[str, object], names: Collection[str]) -> dict[str, Tensor]:
    """Return the columns of a batch by their own names, lengths included."""
    wanted = {*names, *(f"{name}_length" for name in names)}
    return {
        key[len(PREFIX) :]: value
        for key, value in batch.items()
        if key.startswith(PREFIX) and key[len(PREFIX) :] in wanted and isinstance(value, Tensor)
    }
