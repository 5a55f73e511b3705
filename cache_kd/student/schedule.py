"""In: the views that a cache holds and the length of the run. Out: the view of each epoch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cache_kd.errors import MismatchError
from cache_kd.structures import View


@dataclass(frozen=True)
class ViewSchedule:
    """Epoch → view.

    Epoch e of `epochs` shows mixed view e mod `mixed`; the last `close` epochs show plain view (e - (epochs - close))
    mod `plain`, as the stock trainer closes its mosaic from epoch epochs - close on. With no plain views it never
    closes; with no mixed views every epoch is plain.
    """

    mixed: int
    plain: int
    epochs: int
    close: int

    @classmethod
    def for_cache(cls, views: Iterable[View], *, epochs: int, close: int) -> ViewSchedule:
        """Return the schedule over the views of a cache; raises `MismatchError` if it has none."""
        kinds = [view.kind for view in views]
        if not kinds:
            raise MismatchError("the cache holds no views; extract some: cache-kd extract --teacher best.pt --views 8")
        return cls(kinds.count("mixed"), kinds.count("plain"), epochs, close)

    def view(self, epoch: int) -> View:
        """Return the view of `epoch`, counted from 0."""
        start = max(self.epochs - self.close, 0) if self.close else self.epochs
        if self.plain and (epoch >= start or not self.mixed):
            return View("plain", (epoch - start) % self.plain)
        return View("mixed", epoch % self.mixed)
