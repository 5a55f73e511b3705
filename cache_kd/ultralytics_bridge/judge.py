"""In: a finished checkpoint and a split. Out: what Ultralytics' own validator says of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionValidator

from cache_kd.ultralytics_bridge.gate import no_download_entries, safe_loading
from cache_kd.ultralytics_bridge.scan import validation_set


@dataclass(frozen=True)
class Verdict:
    """mAP of a checkpoint, 0 to 1; of each class that the split holds, mAP50-95."""

    map50_95: float
    map50: float
    per_class: dict[str, float]


class UntouchedValidator(DetectionValidator):
    """Ultralytics' validator; no file beside the images is read as code or written."""

    def build_dataset(self, img_path: str, mode: str = "val", batch: int | None = None) -> Any:
        return validation_set(self.args, img_path, batch=batch, data=self.data, mode=mode, stride=self.stride)


def judge(weights: Path, *, data: Path, split: str, out: Path, trusted: bool, settings: dict[str, Any]) -> Verdict:
    """Validate a checkpoint on a split of a data set, whatever its training looked at.

    Args:
        out: Folder for what the validator writes. trusted: The file may run code while it loads.
        settings: Ultralytics' own: imgsz, batch, device.
    """
    with safe_loading(trusted=trusted), no_download_entries():
        found = YOLO(weights, task="detect").val(
            validator=UntouchedValidator,
            data=str(data),
            split=split,
            project=str(out.parent),
            name=out.name,
            exist_ok=True,
            plots=False,
            verbose=False,
            workers=0,
            **settings,
        )
    box = found.box
    classes = {str(found.names[int(index)]): float(box.maps[int(index)]) for index in box.ap_class_index}
    return Verdict(float(box.map), float(box.map50), classes)
