"""In: seed, view, image index. Out: a 64-bit seed an item, and a scope in which every random stream starts from it."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from cache_kd.structures import View


def item_seed(seed: int, view: View, index: int) -> int:
    """Return the 64-bit seed of one item: blake2b of (seed, kind, number, index), equal on every platform.

    Python's own `hash` is salted per process and would not do.
    """
    text = repr((int(seed), view.kind, view.number, int(index)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@contextlib.contextmanager
def random_scope(seed: int) -> Iterator[int]:
    """Seed python, numpy and torch (CPU) for one item and put the caller's streams back afterwards.

    Yields the 32-bit seed that torch reports as `torch.initial_seed()`; Albumentations from 1.4.21 on keeps a stream of
    its own and takes just that number.
    """
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))
    narrow = seed & 0xFFFF_FFFF
    torch.default_generator.manual_seed(narrow)  # not torch.manual_seed, which would reseed the accelerators too
    try:
        yield narrow
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def pixel_hash(pixels: np.ndarray) -> bytes:
    """Return blake2b-64 of a view's C-order (3, H, W) RGB uint8 bytes."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest()
