"""In: the head that a cache holds. Out: the teacher's last convolutions, run on a student's maps."""

from __future__ import annotations

from torch import Tensor, nn
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.modules.head import Detect


class FrozenDetectHead:
    """The teacher's head as `structures.FrozenHead`: gradient flows through it, its own weights never change.

    It is no module of the student: it is neither trained, nor saved, nor put into training mode with it, and follows
    its input to the device.

    Args:
        head: From `heads.rebuild_head`: eval mode, weights without gradient.
    """

    def __init__(self, head: Detect) -> None:
        self._branches = {"box": head.cv2, "cls": head.cv3}
        self._head = head

    def finish(self, level: int, branch: str, position: int, hold: Tensor) -> Tensor:
        """Run the rest of a branch; see `structures.FrozenHead.finish`."""
        if next(self._head.parameters()).device != hold.device:
            self._head.to(hold.device)
        blocks = list(self._branches[branch][level])
        values = hold
        if position:
            # A copy: the activation works in place, and the map itself is still needed for its gradient.
            values = _activation(blocks[position - 1])(hold.clone())
        for block in blocks[position:]:
            values = block(values)
        return values


def _activation(block: nn.Module) -> nn.Module:
    """Return what follows the last normalisation of a block."""
    activation: nn.Module = [module for module in block.modules() if isinstance(module, Conv)][-1].act
    return activation
