"""In: what a run is made of. Out: its fingerprint, equal for runs that can only end equally; no paths, no dates."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cache_kd import __version__
from cache_kd.errors import CacheKDError
from cache_kd.fingerprint import digest_file, digest_json, digest_sources, scan_sources
from cache_kd.losses import LOSSES, parse_loss
from cache_kd.pipeline.versions import package_versions
from cache_kd.ultralytics_bridge.data import load_data, split_files

NEUTRAL = frozenset({"device", "plots", "verbose", "save_period", "show", "cache"})
"""Settings that change where and how a run is computed or shown, not what comes out but for rounding."""
LOADER = frozenset({"workers"})
"""Settings that change which random views the stock loader makes; views of a cache do not depend on them."""
PACKAGES = ("ultralytics",)
TOLD = frozenset({"title", "paper", "cost", "default_weight"})
"""What a loss's class says of itself; a run's specs hold the weight that it trained with."""


def run_fingerprint(
    *,
    mode: str,
    student: Mapping[str, Any],
    teacher: str | None,
    data: Mapping[str, Any],
    cache: Mapping[str, Any] | None,
    losses: Iterable[str],
    balance: float | None,
    settings: Mapping[str, Any],
    seed: int,
    judge: Mapping[str, Any],
) -> str:
    """Return the fingerprint of a run.

    Args:
        teacher: identity of its weights where it is beside the run. cache: identity of the one it reads, and the views
            that it shows: what decides the stored targets, so an extraction on another machine is the same cache.
        data: identity of the training images where they do not come from a cache. judge: which weights, split, images.
        settings: Ultralytics'; those that cannot change the result are left out.

    The versions in it: Ultralytics', this package's, and the code of the losses used, comments aside.
    """
    specs = [parse_loss(text) for text in losses]
    ignored = NEUTRAL | (LOADER if cache is not None else frozenset())
    return digest_json(
        {
            "mode": mode,
            "student": dict(student),
            "teacher": teacher,
            "data": dict(data),
            "cache": None if cache is None else dict(cache),
            "losses": [str(spec) for spec in specs],
            "balance": balance,
            "settings": {key: settings[key] for key in sorted(settings) if key not in ignored},
            "seed": seed,
            "judge": dict(judge),
            "versions": {**package_versions(PACKAGES), "cache-kd": __version__},
            "loss_code": {spec.name: method_code(spec.name) for spec in specs},
        }
    )


def student_identity(student: str) -> dict[str, Any]:
    """Return what a student is: the content of its file, or its name where it is one of Ultralytics' own."""
    path = Path(student)
    return {"sha256": digest_file(path)} if path.is_file() else {"stock": student}


def split_identity(data_file: Path, split: str) -> dict[str, Any]:
    """Return the identity of the images and labels of a split."""
    data = load_data(data_file)
    names = [str(data["names"][index]) for index in range(data["nc"])]
    return {"names": names, **digest_sources(scan_sources(*split_files(data, split)))}


def method_code(name: str) -> str:
    """Return the digest of a loss's module and of those beside it that it is made of.

    Comments, docstrings and what its class says of itself do not count. What is imported from elsewhere in the package
    counts by the package's version.
    """
    file = Path(inspect.getfile(LOSSES[name]))
    return digest_json({path.name: _code(path) for path in sorted(_made_of(file))})


def _made_of(file: Path) -> set[Path]:
    """Return a module's file and, one after the other, those that it imports from its own folder."""
    found, open_files = set[Path](), [file]
    while open_files:
        path = open_files.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cache_kd.losses."):
                beside = path.with_name(f"{(node.module or '').rpartition('.')[2]}.py")
                if beside.is_file():
                    open_files.append(beside)
    return found


@cache
def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            inside = isinstance(node, ast.ClassDef)
            body[:] = [item for item in body if not (_is_text(item) or (inside and _is_told(item)))]
    return digest_json(ast.dump(tree))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_told(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and all(isinstance(name, ast.Name) and name.id in TOLD for name in node.targets)


def cache_key(cache: str, roots: Mapping[str, str], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the targets of a recipe's cache depend on: its extraction's identity and each recoding.

    Args:
        roots: digests of the identities of the extractions, by name. entries: the recipe's caches.
    """
    entry = entries[cache]
    if entry.recode is None:
        if cache not in roots:
            raise CacheKDError(f"cache {cache} has no identity yet")
        return {"identity": roots[cache]}
    return {"from": cache_key(entry.recode, roots, entries), **dict(entry.settings)}
