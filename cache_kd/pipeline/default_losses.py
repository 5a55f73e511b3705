"""In: what a cache stores. Out: the losses of a training that names none, and the arrays that they make it read."""

from __future__ import annotations

from collections.abc import Collection

from cache_kd.cache.layout import length_name
from cache_kd.codecs import ViewCodec
from cache_kd.losses import parse_losses
from cache_kd.structures import HeadSpec
from cache_kd.views.packing import PixelCodec


def default_losses(stored: Collection[str], head: HeadSpec) -> tuple[str, ...]:
    """Return the losses of a run that names none: cwd, which gained most in docs/results.md; without features ld, or
    bckd where the head has no distributions of box sides.
    """
    if "features" in stored:
        return ("cwd",)
    return ("ld",) if head.reg_max > 1 else ("bckd",)


def arrays_read(codec: ViewCodec, packing: PixelCodec | None) -> tuple[str, ...]:
    """Return the arrays on disk of a view, the packed one too, that a training with the default losses reads."""
    specs = parse_losses(list(default_losses(codec.store, codec.head)))
    columns = codec.columns_for(frozenset[str]().union(*(spec.needs for spec in specs)))
    views = packing.columns(codec.imgsz) if packing else ()
    read = [*(column for column in codec.columns if column.name in columns), *views]
    return (*(column.name for column in read), *(length_name(column.name) for column in read if column.ragged))
