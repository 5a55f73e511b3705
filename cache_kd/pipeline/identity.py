"""In: what an extraction is made of. Out: its identity, and in words how a cache is made of something else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_kd.cache.manifest import load_manifest
from cache_kd.cache.store import Place
from cache_kd.codecs import ViewCodec
from cache_kd.errors import DamagedCacheError, MismatchError
from cache_kd.fingerprint import (
    ABSENT,
    Difference,
    OtherIdentityError,
    SourceImage,
    differences,
    digest_sources,
    listed,
)
from cache_kd.pipeline.versions import PIXEL_PACKAGES, package_versions
from cache_kd.ultralytics_bridge.heads import describe_head
from cache_kd.ultralytics_bridge.teacher import Checkpoint
from cache_kd.views.packing import PixelCodec, describe_packing
from cache_kd.views.recipe import Recipe

RECODED = "recoded_from"
"""Part of the identity of a cache that was made from another: each earlier cache's identity and fidelity, in order."""
OPTIONS = {
    "imgsz": "--imgsz",
    "seed": "--seed",
    "precision": "--precision",
    "codec.fidelity": "--fidelity",
    "codec.store": "--store",
    "codec.layers": "--taps",
    "codec.pack.spec": "--pack",
}


def teacher_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what targets depend on of a teacher: weights, layers and their constants, class names, strides.

    Not its file: name, training arguments, optimizer and the type that the weights were saved in are left out.
    """
    head = describe_head(checkpoint.model, f"teacher {checkpoint.path}")
    return {
        "weights": checkpoint.weights_sha256,
        "structure": checkpoint.structure_sha256,
        "names": list(head.names),
        "strides": [tap.stride for tap in head.taps],
    }


def cache_identity(
    *,
    teacher: Mapping[str, Any],
    sources: tuple[SourceImage, ...],
    recipe: Recipe,
    imgsz: int,
    seed: int,
    codec: ViewCodec,
    packing: PixelCodec | None,
    precision: str,
) -> dict[str, Any]:
    """Return everything that the content of a cache depends on, and nothing else: no path, date, host or batch size."""
    return {
        "teacher": dict(teacher),
        "data": digest_sources(sources),
        "recipe": recipe.to_json(),
        "imgsz": imgsz,
        "seed": seed,
        "codec": codec_record(codec, packing),
        "precision": precision,
        "versions": package_versions(PIXEL_PACKAGES),
    }


def codec_record(codec: ViewCodec, packing: PixelCodec | None) -> dict[str, Any]:
    """Return what identity and manifest say of how targets and views are kept."""
    return {**codec.describe(), "pack": describe_packing(packing)}


def recodings(identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return from which caches a cache was made, one after the other; none for one that a teacher filled."""
    chain = identity.get(RECODED)
    return [made for made in chain if isinstance(made, dict)] if isinstance(chain, list) else []


def with_command(error: OtherIdentityError, path: Place, teacher: Path) -> MismatchError:
    """Return the refusal of an extraction into `path`, with the teachers' files and the options for that cache."""
    earlier = _recorded_teacher(path)
    options = [option for change in error.differences if (option := _option(change))]
    remedies = [" ".join(options)] if options else list[str]()
    parts = {change.part.split(".")[0] for change in error.differences}
    if "teacher" in parts:
        remedies.append(f"its teacher ({earlier or 'not recorded yet'}, not {teacher.name})")
    if "data" in parts:
        remedies.append("its images and labels")
    if packages := [c for c in error.differences if c.part.startswith("versions.") and isinstance(c.there, str)]:
        remedies.append("pip install " + " ".join(f"{c.part.removeprefix('versions.')}=={c.there}" for c in packages))
    return MismatchError(f"{error}: {listed(remedies)}" if remedies else str(error))


def teacher_differences(recorded: object, checkpoint: Checkpoint) -> str:
    """Return in one phrase how a checkpoint differs from the teacher of a cache; "" if it is the same one."""
    return listed(differences({"teacher": recorded}, {"teacher": teacher_identity(checkpoint)}))


def _recorded_teacher(path: Place) -> str | None:
    try:
        return str(load_manifest(path).teacher.get("file"))
    except DamagedCacheError:  # an extraction that has not ended yet
        return None


def _option(change: Difference) -> str | None:
    """Return the words of the command line that give what is there; None where there are none."""
    if change.there is ABSENT or change.there is None:
        return None
    if change.part.startswith("recipe."):
        value = change.there if isinstance(change.there, str) else json.dumps(change.there)
        return shlex.quote(f"{change.part.removeprefix('recipe.')}={value}")
    if change.part not in OPTIONS:
        return None
    value = ",".join(change.there) if isinstance(change.there, list) else str(change.there)
    return f"{OPTIONS[change.part]} {shlex.quote(value)}"
