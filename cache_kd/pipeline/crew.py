"""In: the settings of an extraction and the device that torch found. Out: who is to share its units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache_kd.pipeline.extract_settings import ExtractSettings

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Crew:
    """Who shares an extraction: processes of this machine, with a device and torch threads each, or Ray's actors."""

    devices: tuple[str, ...]
    threads: int
    ray: bool = False

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def alone(self) -> bool:
        """Whether this process does it all."""
        return self.size == 1 and not self.ray

    def __str__(self) -> str:
        if self.ray:
            return "Ray gives out the units"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.size} processes on {', '.join(dict.fromkeys(self.devices))}, {threads} each"


def crew_of(settings: ExtractSettings, device: str, cores: int) -> Crew:
    """Return processes and threads for the settings; `device`: the one where none was named."""
    if settings.engine == "ray":
        return Crew((device,) * (settings.processes or 1), settings.threads or cores, ray=True)
    choice = settings.devices or (device,)
    count = settings.processes or len(choice)
    devices = tuple(choice[number % len(choice)] for number in range(count))
    return Crew(devices, settings.threads or max(1, cores // count))
