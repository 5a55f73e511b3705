"""In: a cache. Out: what boxes its stored logits say of a view; the teacher is not run."""

from __future__ import annotations

from collections.abc import Callable

from cache_kd.pipeline.opened import Cache
from cache_kd.structures import View
from cache_kd.student.detections import Detections, detections


def stored_boxes(cache: Cache) -> Callable[[View, int], Detections] | None:
    """Return what decodes the teacher's boxes of (view, index); None where the cache keeps no logits."""
    codec, manifest = cache.codec, cache.manifest
    if "logits" not in codec.store:
        return None
    columns = codec.columns_for({"logits"})

    def boxes(view: View, index: int) -> Detections:
        batch = codec.decode_one(cache.reader.read(view, index, columns))
        assert batch.scores is not None and batch.boxes is not None and batch.sent is not None
        return detections(batch.scores[0], batch.boxes[0], manifest.head, manifest.imgsz, sent=batch.sent[0])

    return boxes
