"""In: a complete cache and a coarser fidelity. Out: a smaller cache of the same views, made without the teacher."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_kd.cache.store import Place
from cache_kd.cache.writer import CacheWriter
from cache_kd.codecs import FIDELITIES, ViewCodec
from cache_kd.codecs.logits import SparseLogits
from cache_kd.errors import CacheKDError, MismatchError, SettingError, choices
from cache_kd.fingerprint import OtherIdentityError
from cache_kd.pipeline.contents import stored_columns
from cache_kd.pipeline.extraction import Extracted
from cache_kd.pipeline.identity import RECODED, recodings
from cache_kd.pipeline.leftovers import nothing_left, remove_empty, to_be_made
from cache_kd.pipeline.locations import default_cache_path
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.versions import version_differences
from cache_kd.structures import PIXEL_HASH, STORES, SampleTargets, TargetBatch, View
from cache_kd.teacher.extract import Unit, all_units, open_units
from cache_kd.ultralytics_bridge.kept_anchors import KeptAnchors
from cache_kd.views.seeding import pixel_hash

_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


@dataclass(frozen=True)
class RecodeSettings:
    """Everything that `cache-kd recode` can be told.

    Attributes:
        source: a complete cache. fidelity, store: of the new one; None takes the source's. cache: its folder.
        data: data file, needed only where fewer anchors' logits are kept and the source does not hold its labels.
        jobs: threads that decode and encode; the bytes do not depend on them.
    """

    source: Place
    fidelity: str | None = None
    store: tuple[str, ...] | None = None
    cache: Place | None = None
    data: Path | None = None
    jobs: int = 1


def recode(
    settings: RecodeSettings,
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Write the views of a cache again at a coarser fidelity, or without some of its stores, resumable by unit.

    Raises:
        SettingError: Nothing would be coarser or fewer. CacheKDError: The source is damaged, the disk full, ….
    """
    source = Cache(settings.source, data=settings.data)
    codec = target_codec(source, settings)
    path, writer, made = _open(source, codec, settings)
    started, done = time.perf_counter(), 0
    with writer, nothing_left(path, made):
        units = open_units(writer, all_units(writer, source.views))
        items = sum(len(unit.indices(writer.shard_size, source.manifest.num_images)) for unit in units)
        say(f"{path}: {len(units)} units of {len(source.views)} views to recode from {settings.source}")
        recoder = Recoder(source, codec)
        with ThreadPoolExecutor(settings.jobs) as pool:
            for unit in units:
                done = _one_unit(unit, writer, recoder, pool, done)
                if progress:
                    progress(done, items)
        manifest = writer.finish(source.views, _manifest_fields(source, codec))
    num_bytes = Cache(path).num_bytes
    return Extracted(path, manifest, num_bytes, items, time.perf_counter() - started)


def target_codec(source: Cache, settings: RecodeSettings) -> ViewCodec:
    """Return the codec of the new cache; raises `SettingError` unless it is coarser or has fewer stores."""
    have, store = source.codec, settings.store or source.codec.store
    before, names = have.fidelity.name, list(FIDELITIES)
    wanted = settings.fidelity or before
    if wanted not in names or before not in names:
        unknown = wanted if wanted not in names else before
        raise SettingError(f"--fidelity {unknown!r} is unknown; {choices(unknown, names)}")
    if names.index(wanted) < names.index(before):
        raise SettingError(
            f"{source.path} has fidelity {before}, --fidelity {wanted} is finer, and what was left out cannot "
            f"come back; allowed: {', '.join(names[names.index(before) + 1 :]) or 'none'}; finer ones: cache-kd extract"
        )
    if added := [name for name in store if name in STORES and name not in have.store]:
        raise SettingError(
            f"{source.path} has no {', '.join(added)}; --store may name some of {', '.join(have.store)}; "
            "others: cache-kd extract"
        )
    if wanted == before and set(store) == set(have.store):
        raise SettingError(
            f"{source.path} has fidelity {before} and {', '.join(have.store)} already; choose a coarser --fidelity "
            f"({', '.join(names[names.index(before) + 1 :]) or 'there is none'}), or fewer --store"
        )
    head = have.head if "features" in store else replace(have.head, layers=())
    codec = ViewCodec.create(wanted, head, have.imgsz, store)
    if wanted == before:  # as it is described there, whatever this version calls by that name
        codec = replace(codec, fidelity=have.fidelity)
    return codec


class Recoder:
    """Makes the rows of the new cache from those of the old one.

    Sparse logits do not say which of their anchors lie in labelled boxes, and none of those may be lost: where fewer
    are to be kept, the labels say it. Those stay too that pass the new threshold within the codes' error. What stays
    keeps its values to the bit.
    """

    def __init__(self, source: Cache, codec: ViewCodec) -> None:
        self.source, self.codec = source, codec
        before, after = source.codec, codec
        columns = {column.name for column in stored_columns(codec, source.packing)}
        old, new = before.fidelity, after.fidelity
        changed = {
            "features": old.features.describe() != new.features.describe(),
            "score_map": old.score_map.describe() != new.score_map.describe(),
            "logits": old.logits.describe() != new.logits.describe() or _drops_region(before, after),
            "hold_stats": old.hold_stats.describe() != new.hold_stats.describe(),
        }
        needs = {need for need, differs in changed.items() if differs and _stored(need) in after.store}
        if "hold_stats" in needs and not after.head.hold_channels:
            needs.remove("hold_stats")
        needs |= {f"map:{tap.name}" for tap in after.head.layers} if "features" in needs else set()
        self.encoded = set(after.columns_for(needs))
        self.decoded = before.columns_for(needs)
        self.copied = tuple(name for name in sorted(columns - self.encoded))
        self._alone = threading.Lock()
        self._anchors = KeptAnchors(after.head, after.imgsz, after.store) if "logits" in needs else None

    def row(self, view: View, index: int) -> dict[str, np.ndarray]:
        """Return the row of every column of one view of one image."""
        reader = self.source.reader
        row = reader.read(view, index, self.copied)
        if self.encoded:
            stored = reader.read(view, index, self.decoded)
            batch = self.source.codec.decode_one(stored)
            said = _sample(batch, self._kept(view, index, batch))
            row.update(self.codec.encode_columns(said, self.encoded))
        return row

    def _kept(self, view: View, index: int, stored: TargetBatch) -> np.ndarray | None:
        """Return the anchors to keep whatever their score, where fewer are kept than before.

        Raises:
            MismatchError: the view is made again with other pixels, so its labels may be others too.
        """
        if self._anchors is None:
            return None
        with self._alone:  # views are made with the random state of the process
            sample = self.source.dataset.sample(view, index)
        proof = self.source.reader.read(view, index, (PIXEL_HASH.name,))[PIXEL_HASH.name].tobytes()
        if self.source.packing is None and pixel_hash(sample.pixels) != proof:
            context = version_differences(self.source.manifest.identity)
            raise MismatchError(
                f"view {view.name}, item {index} ({self.source.images[index].path}) has other pixels than the teacher "
                f"saw, so its labels are not known; {context}; keep the logits as they are: --fidelity small, or see "
                f"cache-kd verify {self.source.path} --pixels"
            )
        labelled = self._anchors.kept(sample.boxes)
        before, after = self.source.codec.fidelity.logits, self.codec.fidelity.logits
        if not isinstance(after, SparseLogits) or before.step is None:
            return labelled
        assert stored.scores is not None and stored.sent is not None
        may_pass = after.sent(stored.scores[0].numpy() + before.step / 2, None)
        return np.asarray(labelled | may_pass & stored.sent[0].numpy())


def _drops_region(before: ViewCodec, after: ViewCodec) -> bool:
    """Return whether the anchors of LD's valuable region are to go."""
    return "vlr" in before.store and "vlr" not in after.store and not before.fidelity.logits.sends_all


def _stored(need: str) -> str:
    return "features" if need in ("features", "score_map") else "logits"


def _sample(batch: TargetBatch, kept: np.ndarray | None) -> SampleTargets:
    """Return one decoded sample as the teacher would have said it."""

    def first(values: Any) -> np.ndarray | None:
        return None if values is None else np.asarray(values[0].numpy())

    return SampleTargets(
        features=tuple(level[0].numpy() for level in batch.features or ()),
        scores=first(batch.scores),
        boxes=first(batch.boxes),
        score_map=first(batch.score_map),
        hold_mean=first(batch.hold_mean),
        hold_m2=first(batch.hold_m2),
        in_box=kept,
        layers=tuple(level[0].numpy() for level in batch.layers.values()),
    )


def _open(source: Cache, codec: ViewCodec, settings: RecodeSettings) -> tuple[Place, CacheWriter, tuple[Place, ...]]:
    manifest = source.manifest
    # Rows that were coded twice are not those of an extraction at this fidelity: the cache is another one.
    earlier = {"identity": manifest.identity_digest, "fidelity": source.codec.fidelity.name}
    chain = [*recodings(manifest.identity), earlier]
    identity = {**manifest.identity, "codec": _record(source, codec), RECODED: chain}
    path = settings.cache or default_cache_path(_SUFFIX.sub("", settings.source.resolve().name), identity)
    made = to_be_made(path)
    try:
        writer = CacheWriter.open_or_create(
            path,
            identity=identity,
            data=source.reader.read_data(),
            columns=stored_columns(codec, source.packing),
            num_images=manifest.num_images,
            teacher_arrays={name: source.reader.read_teacher(name) for name in manifest.arrays},
        )
    except OtherIdentityError as error:
        raise MismatchError(str(error)) from error
    except (CacheKDError, KeyboardInterrupt):
        remove_empty(made[1:])
        raise
    return path, writer, made


def _one_unit(unit: Unit, writer: CacheWriter, recoder: Recoder, pool: ThreadPoolExecutor, done: int) -> int:
    started = time.perf_counter()
    indices = unit.indices(writer.shard_size, writer.num_images)
    rows: dict[str, list[np.ndarray]] = {}
    for row in pool.map(lambda index: recoder.row(unit.view, index), indices):
        for name, values in row.items():
            rows.setdefault(name, []).append(values)
        writer.sign()
    seconds: Mapping[str, float] = {"recode": round(time.perf_counter() - started, 6)}
    writer.write_unit(unit.view, unit.shard, rows, recoder.source.manifest.environment, seconds=seconds)
    return done + len(indices)


def _record(source: Cache, codec: ViewCodec) -> dict[str, Any]:
    """Return what identity and manifest say of the new cache's codecs: views were packed by the source's encoder."""
    return {**codec.describe(), "pack": source.manifest.codec["pack"]}


def _manifest_fields(source: Cache, codec: ViewCodec) -> dict[str, Any]:
    manifest = source.manifest
    return {
        "teacher": manifest.teacher,
        "head": codec.head,
        "codec": _record(source, codec),
        "imgsz": manifest.imgsz,
        "seed": manifest.seed,
        "recipe": manifest.recipe,
        "environment": manifest.environment,
    }
