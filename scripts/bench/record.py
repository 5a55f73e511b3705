"""In: figures of one benchmark. Out: a dated JSON beside this file with the machine and the versions they belong to."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cache_kd.pipeline.versions import OTHER_PACKAGES, PIXEL_PACKAGES, package_versions

RESULTS = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest of `values`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def write(name: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> Path:
    """Write the figures of today's run of benchmark `name` and return the file."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{date.today().isoformat()}-{name}.json"
    content = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "versions": package_versions((*PIXEL_PACKAGES, *OTHER_PACKAGES)),
        "settings": dict(settings),
        "figures": dict(figures),
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file
