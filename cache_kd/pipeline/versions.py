"""In: the installed libraries and the machine. Out: the versions that change pixels, and the rest worth recording."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PIXEL_PACKAGES = ("ultralytics", "opencv-python", "numpy", "albumentations", "pillow")
OTHER_PACKAGES = ("torch", "torchvision", "zarr", "numcodecs", "cache-kd")


def package_versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Return {package: version}, None for one that is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        # OpenCV comes in several builds that share one module.
        return _version("opencv-python-headless") if package == "opencv-python" else None


def environment(*, device: str, batch: int, precision: str) -> dict[str, Any]:
    """Return what equal targets to the bit need to be equal in, and what helps to explain where they are not."""
    accelerator = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "device": device.split(":")[0],
        "accelerator": accelerator,
        "batch": batch,
        "precision": precision,
        # Those that extractions use, whatever a training left this process with.
        "threads": cpu_threads(),
        "versions": package_versions((*PIXEL_PACKAGES, *OTHER_PACKAGES)),
        "python": platform.python_version(),
    }


def other_versions(identity: Mapping[str, Any]) -> str:
    """Return which packages that change pixels have another version than at the extraction; "" if none has."""
    recorded = identity.get("versions")
    then = recorded if isinstance(recorded, Mapping) else {}
    now = package_versions(PIXEL_PACKAGES)
    return ", ".join(
        f"{name} {then.get(name) or 'absent'} then, {now[name] or 'absent'} now"
        for name in now
        if then.get(name) != now[name]
    )


def version_differences(identity: Mapping[str, Any]) -> str:
    """Return the same as a phrase that explains pixels which differ."""
    differing = other_versions(identity)
    return f"other versions: {differing}" if differing else "the library versions are those of the extraction"


def cpu_threads() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
