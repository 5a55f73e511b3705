"""How far workers run ahead: what their batches take stays under a stated limit, or training is refused before it."""

from __future__ import annotations

import pytest

from cache_kd.cache.reader import MAX_BLOCK_BYTES
from cache_kd.errors import SettingError
from cache_kd.student.prefetch import LEAST, MOST, QUEUE_BYTES, Prefetch, choose_prefetch

MIB = 1 << 20


@pytest.mark.parametrize("workers", [1, 2, 8, 32])
@pytest.mark.parametrize("batch_bytes", [1, 10 * MIB, 100 * MIB, 400 * MIB])
def test_the_queue_stays_under_its_limit_where_the_least_does(batch_bytes: int, workers: int) -> None:
    chosen = choose_prefetch(batch_bytes, workers, None)
    least = Prefetch(workers, LEAST, batch_bytes)
    assert LEAST <= chosen.ahead <= MOST
    assert chosen.queue_bytes <= max(QUEUE_BYTES, least.queue_bytes)


def test_the_queue_is_as_long_as_the_limit_allows() -> None:
    for workers in (1, 2, 8):
        for batch_bytes in range(MIB, 200 * MIB, 7 * MIB):
            chosen = choose_prefetch(batch_bytes, workers, None)
            longer = Prefetch(workers, chosen.ahead + 1, batch_bytes)
            assert chosen.ahead == MOST or longer.queue_bytes > QUEUE_BYTES


def test_the_figures_of_a_large_training() -> None:
    # 64 views of 640 pixels, each with the 1,433,600 codes of three levels
    chosen = choose_prefetch(64 * (3 * 640**2 + 1_433_600), 2, 24 << 30)
    assert (chosen.ahead, chosen.batches) == (2, 6)
    assert chosen.queue_bytes == 6 * 64 * (1_228_800 + 1_433_600)
    assert chosen.total_bytes(512 * MIB) == chosen.queue_bytes + 2 * (MAX_BLOCK_BYTES + 512 * MIB)
    assert choose_prefetch(10 * MIB, 0, 0).total_bytes(0) == 20 * MIB + MAX_BLOCK_BYTES


def test_little_shared_memory_shortens_the_queue() -> None:
    assert choose_prefetch(10 * MIB, 2, 64 * MIB).ahead == 2
    assert choose_prefetch(10 * MIB, 2, 80 * MIB).ahead == 3


def test_too_little_shared_memory_is_refused_with_what_to_type() -> None:
    said = (
        r"^workers=2 need 66 MiB of shared memory \(6 batches of 11\.0 MiB\), /dev/shm has 64 MiB free; "
        r"train with workers=0, .*docker run --shm-size=1g$"
    )
    with pytest.raises(SettingError, match=said):
        choose_prefetch(11 * MIB, 2, 64 * MIB)
    assert choose_prefetch(11 * MIB, 0, 0).workers == 0
