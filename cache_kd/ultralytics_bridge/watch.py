"""In: what steps leave in a distilled student. Out: alarms about its terms, and the rows of kd_gradients.csv."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.student.alarms import TermWatch
from cache_kd.ultralytics_bridge.student import DistilledMixin

GRADIENTS = "kd_gradients.csv"
GATHERED = 10
"""Steps whose terms an accelerator hands over together."""


class StepWatch:
    """Watches the raw terms of a run's steps and writes down each epoch's shares of the gradient.

    Args:
        cache: the cache's folder as one types it, for messages.
    """

    def __init__(self, cache: str) -> None:
        self.terms = TermWatch(cache)

    def see(self, model: nn.Module, *, at_once: bool) -> None:
        """Hand the raw terms of recent batches to the alarms.

        Args:
            at_once: even if they are few, as on a CPU; else several together, to spare the device a wait a step.
        """
        student = unwrap_model(model)
        if not isinstance(student, DistilledMixin) or not (at_once or len(student.kd_seen) >= GATHERED):
            return
        seen, student.kd_seen = student.kd_seen, []
        for terms, finite, place in seen:
            values = {name: float(term) for name, term in terms.items()}
            # Elsewhere steps may have been taken since the terms were computed, and have spread what is not finite.
            broken = student.kd.not_finite if finite.device.type == "cpu" else lambda name: []
            self.terms.see(values, student_finite=bool(finite), place=place, broken=broken)

    def save_shares(self, model: nn.Module, folder: Path, epoch: int) -> None:
        """Add the rows of `epoch`, from 0, to kd_gradients.csv, and warn of shares that teach nothing or all."""
        student = unwrap_model(model)
        self.see(model, at_once=True)
        shares: dict[str, float] | None = getattr(student, "kd_shares", None)
        if not shares:
            return
        weights: dict[str, float] = student.kd_weights
        self.terms.see_shares({name: share for name, share in shares.items() if weights[name]})
        log = folder / GRADIENTS
        head = "" if log.exists() else "epoch,term,share,weight\n"
        rows = "".join(f"{epoch + 1},{name},{share:.5f},{weights[name]:.6g}\n" for name, share in shares.items())
        with log.open("a", encoding="utf-8") as file:
            file.write(head + rows)
