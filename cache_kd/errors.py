"""In: what went wrong, where, and the values allowed. Out: one-line exceptions that the command line prints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
"""What a line of the log looks like, in every process of a command."""


class CacheKDError(Exception):
    """Base of every error raised on purpose by cache-kd; its message is one complete line."""


class SettingError(CacheKDError, ValueError):
    """A setting, option or recipe key has a value that is not allowed."""


class MissingFileError(CacheKDError, FileNotFoundError):
    """A file or folder named by the user, by a data file or by a cache is not there."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class InputDataError(CacheKDError, ValueError):
    """A checkpoint, data file, image or label cannot be used."""


class MismatchError(CacheKDError, ValueError):
    """Cache, data set, teacher or student do not belong together."""


class DamagedCacheError(CacheKDError, ValueError):
    """A cache is incomplete, truncated or fails a checksum."""


class DiskSpaceError(CacheKDError, OSError):
    """The disk has less room than the cache will need."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class UnitsError(CacheKDError, RuntimeError):
    """Some units of an extraction could not be made; the others are committed."""


class RecipeError(SettingError):
    """A recipe cannot be run; `faults` says everything that is wrong with it, one line each, with file and line."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


class AlarmError(CacheKDError, RuntimeError):
    """A distillation term, a target or a gradient has a value that makes the run worthless."""


@contextmanager
def in_own_words() -> Iterator[None]:
    """Give an error of ours that a loader's worker raised its line back: torch wraps it in the worker's traceback."""
    try:
        yield
    except CacheKDError as error:
        kind = type(error)
        wrapping, _, line = str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")
        if "in DataLoader worker process" not in wrapping:
            raise
        raise kind(line.strip()) from error


def choices(name: str, known: Iterable[str]) -> str:
    """Return "known: a, b, c" followed by the nearest known name, for messages about an unknown `name`."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"known: {', '.join(names)}" + (f"; did you mean {near[0]!r}?" if near else "")
