"""In: bytes and seconds as numbers, or bytes as words like 40GB. Out: the other of the two."""

from __future__ import annotations

import re

from cache_kd.errors import SettingError

UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(kB|MB|GB|TB|B)", re.IGNORECASE)


def megabytes(count: float) -> str:
    """Return bytes as text with a fitting decimal unit."""
    for unit, size in UNITS.items():
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def parse_size(text: str, option: str) -> int:
    """Return the bytes that `text` says, at least 1; raises `SettingError` naming `option` for anything else."""
    match = _SIZE.fullmatch(text.strip())
    factors = {unit.upper(): size for unit, size in UNITS.items()}
    count = int(float(match[1]) * factors.get(match[2].upper(), 1.0)) if match else 0
    if count < 1:
        raise SettingError(f"{option} {text!r} is no size; allowed: a number and a unit, as 500MB, 40GB, 1.5TB")
    return count


def duration(seconds: float) -> str:
    """Return seconds as text with a fitting unit."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
