"""In: what the user asked of an extraction, and what the teacher recorded. Out: the settings that it runs with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache_kd.cache.store import Place
from cache_kd.errors import InputDataError, SettingError, choices
from cache_kd.pipeline.parts import Part
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.data import find_data_file
from cache_kd.ultralytics_bridge.settings import check_settings, default_settings
from cache_kd.views.packing import parse_packing
from cache_kd.views.recipe import RECIPE_KEYS, Recipe

LOG = logging.getLogger(__name__)
RANGES = {
    "views": (0, 9999),
    "plain_views": (0, 9999),
    "batch": (1, 4096),
    "workers": (0, 256),
    "seed": (-(2**63), 2**63 - 1),
    "processes": (1, 1024),
    "threads": (1, 1024),
}
"""What whole numbers may be; the upper ends keep a slip of the finger from filling the memory."""
MAX_IMGSZ = 8192
ENGINES = ("local", "ray")
DEFAULT_FIDELITY = "default"


@dataclass(frozen=True)
class ExtractSettings:
    """Everything that `cache-kd extract` can be told; None takes what the teacher's checkpoint recorded.

    Attributes:
        views, plain_views: K mixed and P plain views. batch: views a forward pass. workers: loader processes.
        device: torch device, or several with commas; None takes the first GPU, else the CPU.
        augment: augmentation keys that override.
        taps: layers whose maps are kept beside those that the head sees. pack: none, jpeg[:quality] or png: whether
            the views themselves are kept, and how.
        fidelity: None takes `DEFAULT_FIDELITY`, or what the budget allows. budget: bytes that the cache may take; the
            number of mixed views is then at most `views`.
        part: which part of the units is made here, others elsewhere; None: all of them. processes: that make units,
            None: one a device. threads: of torch in each; None: the cores, shared out. engine: this machine, or a Ray
            cluster at `address`. retry: units that were given up are tried again.
    """

    teacher: Path
    data: Path | None = None
    cache: Place | None = None
    views: int = 8
    plain_views: int = 1
    imgsz: int | None = None
    batch: int = 16
    device: str | None = None
    workers: int | None = None
    seed: int = 0
    store: tuple[str, ...] = ("features", "logits")
    taps: tuple[str, ...] = ()
    fidelity: str | None = None
    pack: str = "none"
    precision: str = "fp32"
    trust_teacher: bool = False
    imports: tuple[Path, ...] = ()
    allow_download: bool = False
    augment: Mapping[str, Any] | None = None
    budget: int | None = None
    part: Part | None = None
    processes: int | None = None
    threads: int | None = None
    engine: str = "local"
    address: str | None = None
    retry: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                option, allowed = "--" + name.replace("_", "-"), f"{low} or more" if value < low else f"{low} to {high}"
                raise SettingError(f"{option} {value}; allowed: {allowed}")
        for option, names, what in (("--taps", self.taps, "a layer"), ("--store", self.store, "a target")):
            if len({*names}) != len(names):
                raise SettingError(f"{option} {','.join(names)} names {what} twice; name each once")
        parse_packing(self.pack)
        self._check_engine()
        if self.views + self.plain_views == 0:
            raise SettingError("--views 0 --plain-views 0 leaves nothing to extract; allowed: at least one view")

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise SettingError(f"--engine {self.engine!r}; {choices(self.engine, ENGINES)}")
        if self.engine == "ray" and self.part is not None:
            raise SettingError(f"--part {self.part} with --engine ray: Ray gives out all units; leave one of them out")
        if self.engine == "ray" and len(self.devices) > 1:
            raise SettingError(f"--device {self.device} with --engine ray: Ray gives each worker its GPU; leave it out")
        if self.engine != "ray" and self.address is not None:
            raise SettingError(f"--address {self.address} is that of a Ray cluster; add --engine ray")
        if len({*self.devices}) != len(self.devices):
            raise SettingError(f"--device {self.device} names a device twice; more on one device: --processes")
        if self.processes is not None and self.processes < len(self.devices):
            raise SettingError(
                f"--processes {self.processes} for {len(self.devices)} devices; allowed: {len(self.devices)} or more"
            )

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that were named; none: the default one."""
        return tuple(part for part in (self.device or "").split(",") if part)

    @property
    def view_list(self) -> list[View]:
        """The views in the order of their extraction: mixed ones first."""
        return [View("mixed", n) for n in range(self.views)] + [View("plain", n) for n in range(self.plain_views)]


def data_file_of(settings: ExtractSettings, recorded: Mapping[str, Any]) -> Path:
    if settings.data is not None:
        return settings.data
    if not recorded.get("data"):
        raise InputDataError(f"teacher {settings.teacher} recorded no data file; name it: --data my.yaml")
    return find_data_file(
        str(recorded["data"]), beside=(settings.teacher.parent,), purpose=f"teacher {settings.teacher}"
    )


def recipe_of(settings: ExtractSettings, recorded: Mapping[str, Any]) -> tuple[Recipe, int]:
    """Return recipe and image size: what the user says, else what the checkpoint recorded, else the stock values."""
    overrides = dict(settings.augment or {})
    if unknown := sorted(set(overrides) - set(RECIPE_KEYS)):
        name = unknown[0]
        raise SettingError(f"{name}={overrides[name]!r} is not an augmentation key; {choices(name, RECIPE_KEYS)}")
    for key in ("multi_scale", "rect"):
        if recorded.get(key):
            LOG.warning("the teacher was trained with %s=%s; views have one square size", key, recorded[key])
    stock = default_settings()
    merged = {key: overrides.get(key, recorded.get(key, stock.get(key))) for key in RECIPE_KEYS}
    check_settings({key: value for key, value in merged.items() if value is not None})
    size = settings.imgsz if settings.imgsz is not None else recorded.get("imgsz") or stock["imgsz"]
    if isinstance(size, list | tuple):
        size = max(size)
    if size % 32 or not 32 <= size <= MAX_IMGSZ:
        near = min(max(32, round(size / 32) * 32), MAX_IMGSZ)
        most = f" up to {MAX_IMGSZ}" if size > MAX_IMGSZ else ""
        raise SettingError(f"--imgsz {size}; allowed: multiples of 32{most}, for example {near}")
    return Recipe.from_settings(merged), int(size)


def device_of(name: str) -> str:
    try:
        device = torch.device(f"cuda:{name}" if name.isdigit() else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise SettingError(f"--device {name}: {first}; allowed: cpu, or a device that torch sees, as cuda:0") from None
    return str(device)


def loader_workers(settings: ExtractSettings, processes: int = 1) -> int:
    """Return how many processes make views for each of so many that run the teacher."""
    if settings.workers is not None:
        return settings.workers
    # On the CPU the forward pass takes every core, and a worker would only contend for them.
    return max(1, min(8, cpu_threads() // processes)) if torch.cuda.is_available() else 0
