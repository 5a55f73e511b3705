"""In: a view's stored targets, on request the teacher's own. Out: what the codec did to them, level by level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cache_kd.codecs.logits import shifted_boxes
from cache_kd.pipeline.identity import recodings
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.target_errors import fidelities
from cache_kd.report.coding_pictures import CodedLevel, CodedLogits
from cache_kd.structures import SampleTargets, TargetBatch


def coded_levels(
    cache: Cache, row: Mapping[str, np.ndarray], targets: TargetBatch, live: SampleTargets | None
) -> list[CodedLevel]:
    """Return every stored map with its declared bound; a recoded cache errs by the bound of each coding."""
    if targets.features is None:
        return []
    columns = {name: torch.from_numpy(np.array(values))[None] for name, values in row.items()}
    coded = fidelities(cache.manifest.identity, cache.codec)
    times = len(coded) - ("exact" in coded[:-1])  # half precision errs by far less than a step
    head, layers = cache.manifest.head, cache.codec.layer_step(columns)
    names = [tap.name for tap in (*head.taps, *head.layers)]
    stored = [*targets.features, *(targets.layers[name] for name in layers)]
    bounds = [*cache.codec.feature_step(columns), *layers.values()]
    true = [*live.features, *live.layers] if live is not None else [None] * len(names)
    return [
        CodedLevel(name, maps[0].numpy(), times * bound[0].float().numpy(), said)
        for name, maps, bound, said in zip(names, stored, bounds, true, strict=True)
    ]


def coded_logits(cache: Cache, targets: TargetBatch, live: SampleTargets | None) -> CodedLogits | None:
    """Return which anchors were sent and the errors of their logits; None where the cache keeps none."""
    if targets.sent is None or targets.scores is None or targets.boxes is None:
        return None
    manifest, step = cache.manifest, cache.codec.logit_step
    sent = targets.sent[0].numpy()
    counts = [height * width for height, width in manifest.head.grids(manifest.imgsz)]
    parts = np.split(sent, np.cumsum(counts)[:-1])
    errors = {}
    if live is not None and live.scores is not None and live.boxes is not None:
        boxes = shifted_boxes(live.boxes, manifest.head.reg_max)
        for name, stored, true in (("class logits", targets.scores, live.scores), ("box logits", targets.boxes, boxes)):
            errors[name] = ((stored[0].numpy() - true)[sent] / (step or 1.0)).ravel()
    return CodedLogits(
        names=tuple(tap.name for tap in manifest.head.taps),
        sent=tuple(int(part.sum()) for part in parts),
        anchors=tuple(counts),
        errors=errors,
        unit="logits" if step is None else f"steps of {step:g}",
    )


def codec_in_words(cache: Cache) -> list[str]:
    """Return lines about how targets are stored and what that saves."""
    codec, manifest = cache.codec, cache.manifest
    lines = [f"fidelity {codec.fidelity.name}"]
    floats = 0
    if "features" in codec.store:
        described = codec.fidelity.features.describe()
        lines.append(f"maps: {', '.join(f'{key} {value}' for key, value in described.items())}")
        floats += sum(level.size for level in (*codec.levels, *codec.layers))
    if "logits" in codec.store:
        step = codec.logit_step
        sends = "all anchors" if codec.fidelity.logits.sends_all else f"p > {_threshold(cache)} or in a labelled box"
        lines += [f"logits: {sends},", "half precision" if step is None else f"step {step:g}"]
        shape = codec.logit_shape
        floats += shape.anchors * (shape.classes + shape.box_width)
    size = cache.num_bytes / (manifest.num_images * len(manifest.views))
    lines.append(f"a view: {size / 1e3:.0f} kB on the disk, {4 * floats / size:.1f} times")
    lines.append(f"less than its {4 * floats / 1e3:.0f} kB in float32")
    if made := recodings(manifest.identity):
        lines.append(f"recoded {len(made)} times: bounds add up")
    return lines


def _threshold(cache: Cache) -> object:
    return cache.codec.fidelity.logits.describe().get("threshold")
