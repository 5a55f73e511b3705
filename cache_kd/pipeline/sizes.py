"""In: bytes and seconds as numbers. Out: words for people, with a fitting unit."""

from __future__ import annotations

from cache_kd.config import UNITS


def megabytes(count: float) -> str:
    """Return bytes as text with a fitting decimal unit."""
    for unit, size in UNITS.items():
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Return seconds as text with a fitting unit."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
