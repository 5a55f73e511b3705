"""In: feature maps. Out: how badly each channel of the student correlates with the teacher's (PKD)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cache_kd.losses.maps import MapLoss, channel_adapters
from cache_kd.losses.numeric import comparable
from cache_kd.structures import DetectorOutput, HeadSpec, TargetBatch


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Pearson correlation loss of one level.

    ½ · mean_{n,f,hw} (z(S) − z(T))², z(X) = (X − mean) / (std + 1e-6), mean and unbiased standard deviation of each
    channel over all cells of the batch. Cao et al., "PKD: General Distillation Framework for Object Detectors via
    Pearson Correlation Coefficient", NeurIPS 2022. Mean over everything: for m = N·H·W cells it is (m − 1)/m times
    1 − r averaged over channels, r being Pearson's correlation. 0 when each channel is an increasing affine function of
    the teacher's. The authors' code is the same, with 6 in front for detectors; it also resizes maps of unequal sizes.

    The statistics are those of the part of a batch that one device has, as batch norm's are in Ultralytics and PKD's in
    the authors' code; each device's part of a batch of 16 on two counts m over its 8 images. Repeating a batch changes
    the value by order 1/m.

    Args:
        student: (N, F, H, W), after the adapter. A constant channel has z = 0; a single cell gives 0.
        teacher: (N, F, H, W), never receives gradient.
    """
    student, teacher = comparable(student, teacher)
    return F.mse_loss(_standard(student), _standard(teacher)) / 2 if student.numel() else student.sum()


class PKD(MapLoss):
    """`pkd_loss` summed over the pairs of maps.

    Where channel numbers differ, a 1x1 convolution lifts the student's map. It has no bias: the normalisation removes
    one, so its gradient would be rounding noise, which Adam turns into full steps.
    """

    name = "pkd"
    title = "the neck's maps up to scale and offset of each channel, as correlations"
    paper = "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient, NeurIPS 2022"
    default_weight = 1.4
    cost = "mean and deviation of every channel; 1x1 convolution where channels differ"
    batch_rule = "statistics"

    def __init__(self, teacher: HeadSpec, student: HeadSpec, *, layers: tuple[str, ...] = ()) -> None:
        super().__init__(teacher, student, layers=layers)
        self.adapters = channel_adapters(self.pairs, bias=False)

    def term(self, student: DetectorOutput, targets: TargetBatch) -> Tensor:
        pairs = zip(self.adapters, self.maps(student, targets), strict=True)
        losses = [pkd_loss(adapter(ours), theirs) for adapter, (ours, theirs) in pairs]
        return sum(losses[1:], losses[0])


def _standard(maps: Tensor) -> Tensor:
    """Return each channel of (N, F, H, W) maps with mean 0 and deviation 1 over the cells of the batch."""
    cells = maps.shape[0] * maps.shape[2] * maps.shape[3]
    axes = (0, 2, 3)
    # One cell has no unbiased deviation: without the correction it is 0, and so are value and gradient.
    deviation = maps.std(axes, correction=min(cells - 1, 1), keepdim=True)
    return (maps - maps.mean(axes, keepdim=True)) / (deviation + 1e-6)
