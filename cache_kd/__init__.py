"""Knowledge distillation of object detectors from a cache: run the teacher once, train many students."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_kd.pipeline.api import Cache, extract, open_cache, run_recipe, train

__version__ = "0.1.0"
__all__ = ["Cache", "extract", "open_cache", "run_recipe", "train"]


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is first used: torch and Ultralytics take seconds."""
    if name in __all__:
        from cache_kd.pipeline import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
