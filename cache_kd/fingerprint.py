"""In: mappings, files, tensors. Out: identities that depend on content alone, never on paths, dates or hosts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_kd.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor


def canonical_json(content: Any) -> bytes:
    """Return JSON with sorted keys and one spelling: equal content gives equal bytes. NaN is refused."""
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def digest_json(content: Any) -> str:
    """Return sha256 over `canonical_json`."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def digest_file(path: Path) -> str:
    """Return sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return sha256 over names, types, shapes and bytes of named tensors, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class SourceImage:
    """One image of the data set: path below the set's common folder, bytes, content hashes of image and label."""

    path: str
    bytes: int
    image: str
    label: str

    def to_json(self) -> list[str | int]:
        return [self.path, self.bytes, self.image, self.label]


def scan_sources(images: Iterable[str], labels: Iterable[str]) -> tuple[SourceImage, ...]:
    """Return content hashes (blake2b-128) of image and label files in their order; a missing label hashes to ""."""
    # A list of images in a text file may name some by absolute and some by relative paths.
    pairs = [(Path(image).absolute(), Path(label)) for image, label in zip(images, labels, strict=True)]
    root = _common_folder([image for image, _ in pairs])

    def scan(pair: tuple[Path, Path]) -> SourceImage:
        image, label = pair
        content = image.read_bytes()
        label_hash = _short_hash(label.read_bytes()) if label.is_file() else ""
        # A name that is not UTF-8 cannot stand in JSON as it is.
        name = image.relative_to(root).as_posix().encode(errors="backslashreplace").decode()
        return SourceImage(name, len(content), _short_hash(content), label_hash)

    with ThreadPoolExecutor(8) as pool:
        return tuple(pool.map(scan, pairs))


def digest_sources(sources: Iterable[SourceImage]) -> dict[str, Any]:
    """Return the identity of an ordered set of images by content: moving or renaming the set does not change it."""
    rows = list(sources)
    return {
        "count": len(rows),
        "images": digest_json([row.image for row in rows]),
        "labels": digest_json([row.label for row in rows]),
    }


def compare_sources(recorded: Iterable[SourceImage], found: Iterable[SourceImage]) -> None:
    """Raise `MismatchError` naming the first image or label that differs in content, order or number."""
    before, after = list(recorded), list(found)
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        what = "image" if old.image != new.image else "label" if old.label != new.label else None
        if what and len(before) == len(after):
            raise MismatchError(
                f"the {what} of item {index} ({new.path}) is not the one that the teacher saw ({old.path}: content "
                f"{(old.image if what == 'image' else old.label) or 'absent'}, now "
                f"{(new.image if what == 'image' else new.label) or 'absent'}); restore it or run cache-kd extract"
            )
    if len(before) != len(after):
        extra = {row.path for row in after} ^ {row.path for row in before}
        example = f", for example {min(extra)}" if extra else ""
        raise MismatchError(
            f"the data set has {len(after)} usable images, the cache was extracted from {len(before)}{example}; "
            "restore them or run cache-kd extract again"
        )


def _short_hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _common_folder(images: list[Path]) -> Path:
    folder = images[0].parent if images else Path()
    while not all(image.is_relative_to(folder) for image in images):
        folder = folder.parent
    return folder
