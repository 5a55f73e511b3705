"""In: folders or lists of images with their labels. Out: Ultralytics' data set of them, no file beside them touched."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import get_split_fraction
from ultralytics.utils import LOGGER, colorstr

from cache_kd.errors import InputDataError

LOG = logging.getLogger(__name__)
CORRUPT = ": ignoring corrupt image/label"
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class ScannedDataset(YOLODataset):
    """Ultralytics' data set, read from images and labels alone, which stay as they are.

    The stock set unpickles `labels/*.cache` files, which may run code, and writes them; it prefers `*.npy` files beside
    the images, which may be stale, and deletes broken ones; and it replaces a JPEG that does not end with its end
    marker by a copy. Which images and labels are used is the stock set's decision.

    Attributes:
        faults: what the scan said of images that are left out. notes: what it said of others.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.faults: list[str] = []
        self.notes: list[str] = []
        super().__init__(*args, **settings)

    @property
    def npy_files(self) -> list[Path]:
        """Files that do not exist, one an image: the stock set looks for its `*.npy` here, already while it is made."""
        return self._no_files

    @npy_files.setter
    def npy_files(self, beside: list[Path]) -> None:
        self._no_files = [Path("/nonexistent/none.npy")] * len(beside)

    def cache_labels(self, path: Path = Path("labels.cache")) -> dict[str, Any]:
        """Scan images and labels, write the pickle cache to a throw-away folder, and remember what was said."""
        level = LOGGER.level
        LOGGER.setLevel(logging.ERROR)  # it would announce the throw-away file; `faults` and `notes` hold the rest
        try:
            with tempfile.TemporaryDirectory() as folder:
                result: dict[str, Any] = super().cache_labels(Path(folder) / path.name)
        except ValueError:  # it would name the throw-away file
            label = printable(self.label_files[0])
            raise InputDataError(
                f"{self.img_path}: no image has a label; allowed: a text file an image, for the first of them {label}"
            ) from None
        finally:
            LOGGER.setLevel(level)
        said = [printable(message) for message in result["msgs"]]
        self.faults = [message for message in said if CORRUPT in message]
        self.notes = [message for message in said if CORRUPT not in message]
        return result

    def _load_or_scan_cache(self, cache_path: Path, cache_hash: str) -> tuple[dict[str, Any], bool]:
        return self.cache_labels(cache_path), False

    def verify_args(self) -> tuple[Callable[[tuple[Any, ...]], Any], Any]:
        """Return the stock check of one image and its label, made to write nothing, and its arguments."""
        verify, arguments = super().verify_args()
        return partial(_verify_untouched, verify), arguments


def validation_set(cfg: Any, img_path: str, *, batch: int | None, data: dict[str, Any], mode: str, stride: int) -> Any:
    """Return the data set that the stock `build_yolo_dataset` gives a detector to validate on, files left alone."""
    dataset = ScannedDataset(
        img_path=img_path,
        imgsz=cfg.imgsz,
        batch_size=batch,
        augment=False,
        hyp=cfg,
        rect=True,
        cache=cfg.cache or None,
        single_cls=cfg.single_cls or False,
        stride=stride,
        pad=0.5,
        prefix=colorstr(f"{mode}: "),
        task=cfg.task,
        classes=cfg.classes,
        data=data,
        fraction=1.0 if data.get("complete") else get_split_fraction(cfg.fraction, cfg.split),
    )
    for fault in dataset.faults:
        LOG.warning("skipped as Ultralytics would: %s", fault)
    return dataset


def _verify_untouched(verify: Callable[[tuple[Any, ...]], Any], arguments: tuple[Any, ...]) -> Any:
    """Return what `verify` says of an image; one that it would replace by a repaired copy is shown to it as a copy."""
    image = str(arguments[0])
    if not _would_be_replaced(image):
        return verify(arguments)
    with tempfile.TemporaryDirectory() as folder:
        copy = str(Path(folder) / f"image{Path(image).suffix}")
        shutil.copyfile(image, copy)
        found, *facts, message = verify((copy, *arguments[1:]))
    message = message.replace("corrupt JPEG restored and saved", "JPEG without its end marker, read as it is")
    return [found and image, *facts, message.replace(copy, image)]


def printable(text: str) -> str:
    """Return text that may hold the name of a file in one line that can be written anywhere."""
    return text.replace("\n", "\\n").encode(errors="backslashreplace").decode()


def _would_be_replaced(image: str) -> bool:
    try:
        with open(image, "rb") as file:
            start = file.read(2)
            file.seek(-2, 2)
            return start == JPEG_START and file.read() != JPEG_END
    except OSError:  # missing, or shorter: the check itself says so
        return False
