"""In: raw terms and gradients of a run. Out: warnings and errors when a term cannot be teaching anything."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cache_kd.errors import AlarmError
from cache_kd.losses.ranks import summed

LOG = logging.getLogger(__name__)
CONSTANT_STEPS = 50
SHARE_LOW, SHARE_HIGH = 0.01, 0.90


class TermWatch:
    """Watches the raw terms of one run, before their weights: a weight of 0 is no fault, a term of 0 is one.

    Zero: a loud warning, once a term. Constant for 50 steps: an error. Not finite: an error, unless the student's own
    outputs are not finite, which the trainer recovers from by itself.
    """

    def __init__(self, cache: str = "CACHE") -> None:
        """Watch a run from `cache`, its folder as one types it."""
        self.check = f"check the cache: cache-kd verify {cache}"
        self._last: dict[str, float] = {}
        self._repeats: dict[str, int] = {}
        self._warned: set[tuple[str, str]] = set()

    def see(
        self,
        terms: Mapping[str, float],
        *,
        student_finite: bool = True,
        place: str = "",
        broken: Callable[[str], Sequence[str]] = lambda name: (),
    ) -> None:
        """Take the raw terms of one step.

        Args:
            place: Epoch, view and images of the step, for the message.
            broken: Returns the names of a term's own weights that are not finite.

        Raises:
            AlarmError: A term is not finite although the student's outputs are, or did not change for 50 steps.
        """
        for name, value in terms.items():
            if not math.isfinite(value):
                if student_finite:
                    weights = broken(name)
                    cause = f"of its own weights, {', '.join(weights[:3])} is not finite" if weights else ""
                    raise AlarmError(
                        f"distillation term {name} is {value} although the student's outputs are finite"
                        f"{place and f' ({place})'}; "
                        + (f"{cause}; train again with a lower lr0=… or leave {name} out" if cause else self.check)
                    )
                self._warn(name, "not finite", "%s: the student's outputs are not finite in this step", name)
                continue
            if value == 0.0:
                self._warn(name, "zero", "%s: the raw distillation term is exactly 0, nothing is learnt from it", name)
            self._repeats[name] = self._repeats.get(name, 0) + 1 if value == self._last.get(name) else 1
            self._last[name] = value
            if self._repeats[name] >= CONSTANT_STEPS:
                raise AlarmError(
                    f"distillation term {name} has been {value} for {CONSTANT_STEPS} steps, so it teaches nothing; "
                    f"look at its options: cache-kd losses; or {self.check}"
                )

    def see_shares(self, shares: Mapping[str, float]) -> None:
        """Warn about terms whose share of the gradient on the neck's outputs is below 1 % or above 90 %."""
        for name, share in shares.items():
            if not math.isfinite(share) or not SHARE_LOW <= share <= SHARE_HIGH:
                LOG.warning(
                    "%s has %.2g of the gradient on the student's neck; expected %.2g to %.2g, change it with "
                    "--loss %s:weight=…",
                    name,
                    share,
                    SHARE_LOW,
                    SHARE_HIGH,
                    name,
                )

    def _warn(self, name: str, fault: str, message: str, *values: object) -> None:
        if (name, fault) not in self._warned:
            self._warned.add((name, fault))
            LOG.warning(message, *values)


def gradient_shares(
    detection: Tensor,
    terms: Mapping[str, Tensor],
    features: Sequence[Tensor],
    layers: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, float]:
    """Return each term's share of the gradient on the neck's outputs: |g_term| / (|g_detection| + |g_term|).

    On several devices the gradients are those on the outputs of all of them; every process must call it in one step.

    Args:
        detection: The detection loss, scalar. terms: weighted terms, scalars, in the same scale.
        features: The neck's outputs (B, F, H, W). Without gradient in all of them (a frozen neck) nothing is measured.
        layers: {term: {layer: map (B, F, H, W)}} of terms that compare layers further up; such a term is measured on
            these maps, since what it teaches a backbone never passes the neck's outputs.
    """
    places = {name: list(layers[name].values()) if layers and layers.get(name) else list(features) for name in terms}
    measured = {id(level): level for levels in places.values() for level in levels if level.requires_grad}
    if not measured:
        return {}

    levels = list(measured.values())

    def squares(loss: Tensor) -> Tensor:
        if not loss.requires_grad:
            return torch.zeros(len(levels), device=loss.device)
        # Half-precision gradients of single terms would underflow; the factor cancels in the ratio.
        found = torch.autograd.grad(loss * 1024, levels, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.stack([gradient.float().square().sum() for gradient in found])

    # Those of all images of the step, whatever device they are on.
    rows = summed(torch.stack([squares(detection), *(squares(term) for term in terms.values())])).tolist()
    reference, *own = (dict(zip(measured, row, strict=True)) for row in rows)

    def norm(row: Mapping[int, float], levels: Sequence[Tensor]) -> float:
        return math.sqrt(sum(row.get(id(level), 0.0) for level in levels))

    shares = {}
    for name, row in zip(terms, own, strict=True):
        value = norm(row, places[name])
        shares[name] = value / (norm(reference, places[name]) + value) if value else 0.0
    return shares
