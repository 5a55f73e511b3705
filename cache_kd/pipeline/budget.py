"""In: the room on a disk and what a view takes at each fidelity. Out: fidelity and number of views, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache_kd.errors import DiskSpaceError
from cache_kd.pipeline.sizes import megabytes

PREFERRED = "default"
ENOUGH = 4
"""Mixed views that come before a fidelity: fewer repeat themselves so often that students learn them by heart."""
MARGIN = 1.05
"""An estimate may be this much too low without the cache growing over its budget."""


@dataclass(frozen=True)
class ViewBytes:
    """Bytes of one view of the whole data set."""

    mixed: float
    plain: float


@dataclass(frozen=True)
class Choice:
    """What fits: a fidelity and a number of mixed views, and lines that say why."""

    fidelity: str
    views: int
    reason: tuple[str, ...]


def choose(
    budget: int, sizes: Mapping[str, ViewBytes], *, views: int, plain_views: int, fixed_bytes: float = 0
) -> Choice:
    """Return what is best within `budget` bytes.

    All asked views at a finer fidelity than `PREFERRED` if they fit; else `PREFERRED` with as many views as fit; where
    those are fewer than `ENOUGH`, the finest of the coarser fidelities that leaves room for so many; else most views.

    Args:
        sizes: By fidelity, the finest first. views, plain_views: What is asked; never more, and plain views all.

    Raises:
        DiskSpaceError: Not even one view fits.
    """
    room = {
        name: _room(budget / MARGIN - fixed_bytes - plain_views * size.plain, size.mixed, views)
        for name, size in sizes.items()
    }
    names = list(sizes)
    at = names.index(PREFERRED) if PREFERRED in names else 0
    least = min(1, views)
    finer = [name for name in names[:at] if room[name] >= views]
    enough = [name for name in names[at:] if room[name] >= max(least, min(ENOUGH, views))]
    best = max(names[at:], key=lambda name: room[name])
    if finer:
        fidelity, why = finer[0], f"all {views} mixed views fit at a finer fidelity than {PREFERRED}"
    elif enough:
        fidelity, why = enough[0], _why(enough[0], names[at], room, views)
    elif room[best] >= least:
        fidelity, why = best, f"no fidelity leaves room for {min(ENOUGH, views)} mixed views, this one for most"
    else:
        smallest = sizes[names[-1]]
        needed = (fixed_bytes + least * smallest.mixed + plain_views * smallest.plain) * MARGIN
        raise DiskSpaceError(
            f"--budget {megabytes(budget)} is too small: {least} mixed and {plain_views} plain views at fidelity "
            f"{names[-1]} take {megabytes(needed)}; choose a larger budget, fewer images or --store logits"
        )
    count = room[fidelity]
    total = fixed_bytes + count * sizes[fidelity].mixed + plain_views * sizes[fidelity].plain
    considered = ", ".join(f"{name} {max(0, room[name])}" for name in names)
    return Choice(
        fidelity,
        count,
        (
            f"budget {megabytes(budget)}: fidelity {fidelity}, {count} of {views} mixed views and {plain_views} plain, "
            f"about {megabytes(total)}: {why}",
            f"mixed views that fit, of {views}: {considered}",
        ),
    )


def _room(left: float, view: float, asked: int) -> int:
    """Return how many mixed views fit in `left` bytes, at most `asked`; -1 if not even the plain ones do."""
    return -1 if left < 0 else min(asked, int(left // view))


def _why(chosen: str, preferred: str, room: Mapping[str, int], views: int) -> str:
    if chosen != preferred:
        return f"{preferred} has room for {max(0, room[preferred])} only, and {min(ENOUGH, views)} views come first"
    return "all fit" if room[chosen] == views else f"{ENOUGH} views or more at {chosen} come before a finer fidelity"
