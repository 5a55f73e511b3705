"""In: a cache's place. Out: what it holds and what it was made from, as one mapping and as lines for people."""

from __future__ import annotations

from typing import Any

from cache_kd.cache.files import brief
from cache_kd.cache.store import Place
from cache_kd.pipeline.costs import costs
from cache_kd.pipeline.costs import lines as cost_lines
from cache_kd.pipeline.identity import recodings
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.sizes import megabytes


def describe(path: Place) -> dict[str, Any]:
    """Return the facts of a complete cache as JSON holds them; raises `CacheKDError` for anything else."""
    cache = Cache(path)
    manifest, skipped = cache.manifest, cache.reader.read_data()["skipped"]
    items = manifest.num_images * len(manifest.views)
    by_column: dict[str, int] = {}
    for view in manifest.views:
        for name, entry in cache.reader.files(view).items():
            column = name.split("/")[2]
            by_column[column] = by_column.get(column, 0) + entry.bytes
    total = sum(by_column.values())
    return {
        "path": str(path),
        "format": manifest.format,
        "digest": manifest.digest,
        "identity": manifest.identity_digest,
        "views": [view.name for view in manifest.views],
        "images": manifest.num_images,
        "skipped": skipped,
        "bytes": total,
        "bytes_per_view": total / items,
        "recoded_from": recodings(manifest.identity),
        "costs": costs(cache, by_column),
        "bytes_by_column": dict(sorted(by_column.items(), key=lambda pair: -pair[1])),
        "shard_size": manifest.shard_size,
        "imgsz": manifest.imgsz,
        "seed": manifest.seed,
        "fidelity": manifest.codec,
        "teacher": manifest.teacher,
        "head": manifest.head.to_json(),
        "recipe": manifest.recipe,
        "environment": manifest.environment,
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """Return `describe`'s facts as lines for people."""
    head, teacher, codec = facts["head"], facts["teacher"], facts["fidelity"]
    levels = ", ".join(
        f"{name} {channels} channels, stride {stride}" for name, channels, stride in (*head["taps"], *head["layers"])
    )
    kinds = [f"{sum(name.startswith(kind) for name in facts['views'])} {kind}" for kind in ("mixed", "plain")]
    names = ", ".join(head["names"][:8]) + (", …" if len(head["names"]) > 8 else "")
    environment = facts["environment"]
    total = sum(facts["bytes_by_column"].values())
    shares = ", ".join(f"{name} {100 * size / total:.1f} %" for name, size in facts["bytes_by_column"].items())
    return [
        f"{facts['path']}: format {facts['format']}, digest {facts['digest'][:16]}",
        f"  views     {', '.join(kinds)}, of {facts['images']} images at {facts['imgsz']} px, seed {facts['seed']}"
        + (f"; {len(facts['skipped'])} unreadable images skipped: {facts['skipped'][0]}" if facts["skipped"] else ""),
        f"  size      {megabytes(facts['bytes'])}, {facts['bytes_per_view'] / 1e3:.1f} kB a view ({shares})",
        *cost_lines(facts["costs"], facts["images"]),
        f"  targets   {', '.join(codec['store'])} at fidelity {codec['fidelity']}"
        + "".join(_origin(made) for made in facts["recoded_from"]),
        f"  pixels    {_pixels(codec['pack'])}",
        f"  teacher   {teacher['file']} (sha256 {teacher['file_sha256'][:16]}), {len(head['names'])} classes: {names}",
        f"  levels    {levels}; reg_max {head['reg_max']}",
        f"  data      {teacher['data']}",
        f"  made on   {environment['device']} ({environment['accelerator']}), {environment['precision']}, batch "
        f"{environment['batch']}, {environment['threads']} threads, "
        f"ultralytics {environment['versions']['ultralytics']}",
    ]


def _origin(made: dict[str, Any]) -> str:
    return f", recoded from {brief(made.get('fidelity'), 20)} ({brief(made.get('identity'), 9)})"


def _pixels(pack: dict[str, Any]) -> str:
    if pack["spec"] == "none":
        return "made again from the source images"
    return f"packed as {pack['spec']} ({pack.get('encoder')}); training needs no training images"
