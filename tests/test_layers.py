"""Imports go strictly downward, siblings do not import each other, and each outside library has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cache_kd"
LAYERS = (
    ("errors",),
    ("structures",),
    ("config", "fingerprint"),
    ("views", "codecs", "cache", "losses"),
    ("teacher", "student", "engines", "report"),
    ("ultralytics_bridge",),
    ("pipeline",),
    ("demo",),
    ("cli",),
    ("__init__",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
DOORS = {
    "ultralytics": "ultralytics_bridge",
    "zarr": "cache",
    "numcodecs": "cache",
    "google_crc32c": "cache",
    "click": "cli",
    "yaml": "config",
    "ray": "engines",
}
HEAVY = ("ray", "torch", "numpy", "zarr", "numcodecs", "ultralytics", "cv2", "matplotlib")
# A fact about the package as a whole, free of imports: any layer may ask for it.
FREE = "cache_kd.__version__"


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import in a module, also those inside functions and of type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from cache_kd import x` means the module x or, where there is none, a name of the package itself.
            names = [f"cache_kd.{alias.name}" for alias in node.names] if module == "cache_kd" else [module]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if called in ("import_module", "__import__", "find_spec") and isinstance(name, str):
                yield node.lineno, name


def unit_of(name: str, package: Path) -> str:
    """Return the unit (module or subpackage directly below the package) that a dotted name of ours belongs to."""
    part = [*name.split("."), "__init__"][1]
    known = part in RANK or (package / part).is_dir() or (package / f"{part}.py").is_file()
    return part if known else "__init__"


def fault(unit: str, name: str, package: Path) -> str | None:
    """Return what is wrong with a module of `unit` importing `name`, or None."""
    top = name.split(".")[0]
    if name.startswith("."):
        return "relative import; write it in full"
    if top in DOORS and unit != DOORS[top]:
        return f"{top} may be imported by {DOORS[top]} only"
    if top != "cache_kd" or name == FREE:
        return None
    target = unit_of(name, package)
    if target == unit:
        return None
    if target not in RANK:
        return f"{target} has no layer"
    if RANK[target] == RANK[unit]:
        return f"{unit} and {target} are siblings"
    return f"{unit} is below {target}" if RANK[target] > RANK[unit] else None


def faults(package: Path) -> list[str]:
    """Return one line for every import of `package` that breaks a rule and every module without a layer."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        unit = relative.parts[0].removesuffix(".py")
        if unit not in RANK:
            found.append(f"{relative}: has no layer; name it in tests/test_layers.py")
            continue
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            reason = fault(unit, name, package)
            if reason:
                found.append(f"{relative}:{line}: imports {name}: {reason}")
    return found


def test_package_keeps_its_layers() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 30
    assert faults(PACKAGE) == []


def _tree(folder: Path, files: dict[str, str]) -> Path:
    """Write a small package that keeps every rule, then `files` over it."""
    clean = {
        "__init__.py": "def __getattr__(name):\n    from cache_kd.pipeline import api\n    return getattr(api, name)\n",
        "__main__.py": "from cache_kd.cli import main\n",
        "errors.py": "",
        "structures.py": "from cache_kd.errors import CacheKDError\n",
        "config.py": "import yaml\nfrom cache_kd import errors\n",
        "cache/reader.py": "import zarr\nimport numcodecs.blosc\nfrom cache_kd.cache.shard import read\n",
        "cache/shard.py": "import google_crc32c\nfrom cache_kd import __version__\n",
        "views/recipe.py": "from cache_kd.structures import View\n",
        "ultralytics_bridge/trainer.py": "from ultralytics.engine.trainer import BaseTrainer\n",
        "pipeline/api.py": "from cache_kd.views.recipe import Recipe\n",
        "cli/__init__.py": "from cache_kd.cli import group\n",
        "cli/group.py": "import click\ndef train():\n    import cache_kd.pipeline.api\n",
    }
    for name, text in {**clean, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_clean_tree_has_no_fault(tmp_path: Path) -> None:
    assert faults(_tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("errors.py", "import cache_kd.structures\n", "errors is below structures"),
        ("views/recipe.py", "from cache_kd.pipeline.api import extract\n", "views is below pipeline"),
        ("views/recipe.py", "def f():\n    from cache_kd.pipeline import api\n", "views is below pipeline"),
        ("views/recipe.py", "if TYPE_CHECKING:\n    from cache_kd import pipeline\n", "views is below pipeline"),
        ("views/recipe.py", "from cache_kd import extract\n", "views is below __init__"),
        ("views/recipe.py", "import importlib\nimportlib.import_module('cache_kd.cli')\n", "views is below cli"),
        ("views/recipe.py", "from cache_kd.cache import reader\n", "views and cache are siblings"),
        ("views/recipe.py", "from cache_kd import cache\n", "views and cache are siblings"),
        ("views/recipe.py", "from . import seeding\n", "relative import"),
        ("views/recipe.py", "from ..errors import CacheKDError\n", "relative import"),
        ("pipeline/api.py", "from ultralytics import YOLO\n", "ultralytics may be imported by ultralytics_bridge only"),
        ("pipeline/api.py", "__import__('ultralytics.nn')\n", "ultralytics may be imported by ultralytics_bridge only"),
        ("views/recipe.py", "import zarr.codecs as codecs\n", "zarr may be imported by cache only"),
        ("codecs/logits.py", "import numcodecs\n", "numcodecs may be imported by cache only"),
        ("codecs/logits.py", "from google_crc32c import value\n", "google_crc32c may be imported by cache only"),
        ("pipeline/api.py", "import ray\n", "ray may be imported by engines only"),
        ("pipeline/api.py", "import click\n", "click may be imported by cli only"),
        ("pipeline/api.py", "def f():\n    import yaml\n", "yaml may be imported by config only"),
        ("cli/group.py", "from cache_kd.__main__ import main\n", "cli is below __main__"),
        ("utils.py", "", "has no layer"),
        ("tools/names.py", "", "has no layer"),
    ],
)
def test_each_rule_is_held(tmp_path: Path, file: str, text: str, expected: str) -> None:
    found = faults(_tree(tmp_path, {file: text}))
    assert len(found) == 1, found
    assert found[0].startswith(file)
    assert expected in found[0]


@pytest.mark.parametrize("module", ["cache_kd", "cache_kd.cli", "cache_kd.__main__"])
def test_import_is_light(module: str) -> None:
    code = f"import {module}, sys; print(*sorted(set(sys.modules).intersection({HEAVY!r})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
