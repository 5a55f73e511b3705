"""In: mappings, files, tensors. Out: identities that depend on content alone, never on paths, dates or hosts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_kd.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor

ABSENT = object()
_HASH = re.compile(r"[0-9a-f]{32,128}")
_LISTED, _SHOWN, _SHOWN_HASH = 6, 60, 12


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
    """Raise `MismatchError` that names what differs: images and labels changed, gone, new or in another order."""
    if changes := source_changes(recorded, found):
        raise MismatchError(
            f"the data set is not the one that the teacher saw: {listed(changes)}; restore it, or extract again: "
            "cache-kd extract"
        )


def source_changes(recorded: Iterable[SourceImage], found: Iterable[SourceImage]) -> list[str]:
    """Return one phrase for each difference between two ordered sets of images; names of files alone make none."""
    before, after = list(recorded), list(found)
    same = (old.image == new.image and old.label == new.label for old, new in zip(before, after, strict=False))
    if len(before) == len(after) and all(same):
        return []
    pairs = _same_images(before, after)
    gone = dict(enumerate(before))
    new = dict(enumerate(after))
    for old, now in pairs:
        del gone[old], new[now]
    changes = []
    if len(before) != len(after):
        changes.append(f"{len(before)} usable images there, {len(after)} now")
    for old, now in _same_files(gone, new, by_index=len(before) == len(after)):
        row = new.pop(now)
        changes.append(f"the image of item {now} ({row.path}) changed: {_content(gone.pop(old).image, row.image)}")
    changes += [f"image {row.path} (item {index} there) is gone" for index, row in gone.items()]
    changes += [f"image {row.path} (item {index} now) is new" for index, row in new.items()]
    # Among the images that are in both, only the order counts: one that is gone moves all that follow.
    for (old, _), now in zip(pairs, sorted(now for _, now in pairs), strict=True):
        if before[old].image != after[now].image:
            changes.append(
                f"other order: item {old} was {before[old].path}, item {now} is {after[now].path} "
                f"({_content(before[old].image, after[now].image)})"
            )
    for old, now in pairs:
        if before[old].label != after[now].label:
            labels = _content(before[old].label, after[now].label)
            changes.append(f"the label of item {now} ({after[now].path}) changed: {labels}")
    return changes


def _same_images(before: list[SourceImage], after: list[SourceImage]) -> list[tuple[int, int]]:
    """Return (index before, index after) of images of equal content, ascending before; equal indices go first."""
    pairs = [(i, i) for i, (old, new) in enumerate(zip(before, after, strict=False)) if old.image == new.image]
    paired = {index for index, _ in pairs}
    waiting: dict[str, list[int]] = {}
    for index in reversed(range(len(after))):
        if index not in paired:
            waiting.setdefault(after[index].image, []).append(index)
    for index, row in enumerate(before):
        if index not in paired and waiting.get(row.image):
            pairs.append((index, waiting[row.image].pop()))
    return sorted(pairs)


def _same_files(
    gone: Mapping[int, SourceImage], new: Mapping[int, SourceImage], *, by_index: bool
) -> list[tuple[int, int]]:
    """Return (index before, index after) of files that kept their name or, with `by_index`, their place."""
    names = {row.path: index for index, row in new.items()}
    pairs = [(index, names.pop(row.path)) for index, row in gone.items() if row.path in names]
    if by_index:
        old, now = {index for index, _ in pairs}, {index for _, index in pairs}
        pairs += [(index, index) for index in gone if index in new and index not in old | now]
    return sorted(pairs)


def _content(there: str, now: str) -> str:
    return f"content {there[:_SHOWN_HASH] or 'absent'} there, {now[:_SHOWN_HASH] or 'absent'} now"


@dataclass(frozen=True)
class Difference:
    """A part in which two identities differ: its dotted name, the value there and the one wanted, or `ABSENT`."""

    part: str
    there: Any
    wanted: Any

    def __str__(self) -> str:
        return f"{self.part}: {_shown(self.there)} there, {_shown(self.wanted)} wanted"


class OtherIdentityError(MismatchError):
    """A cache was made of something else; `differences` says of what."""

    def __init__(self, message: str, differences: tuple[Difference, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return the leaves of nested tables that differ, in the order of their dotted names."""
    old, new = _leaves(there), _leaves(wanted)
    return tuple(
        Difference(part, old.get(part, ABSENT), new.get(part, ABSENT))
        for part in sorted({*old, *new})
        if old.get(part, ABSENT) != new.get(part, ABSENT)
    )


def listed(items: Iterable[object]) -> str:
    """Return the first few as one phrase, and how many more there are."""
    texts = [str(item) for item in items]
    more = [f"and {len(texts) - _LISTED} more"] if len(texts) > _LISTED else []
    return "; ".join(texts[:_LISTED] + more)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            leaves.update(_leaves(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:_SHOWN_HASH]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _short_hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _common_folder(images: list[Path]) -> Path:
    folder = images[0].parent if images else Path()
    while not all(image.is_relative_to(folder) for image in images):
        folder = folder.parent
    return folder
