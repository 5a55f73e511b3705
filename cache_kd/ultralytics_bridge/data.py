"""In: the name of a data file. Out: Ultralytics' parsed data mapping, with every fault found before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.data.utils import IMG_FORMATS, check_det_dataset, img2label_paths

from cache_kd.config import read_yaml
from cache_kd.errors import InputDataError, MissingFileError


def find_data_file(recorded: str, *, beside: tuple[Path, ...], purpose: str) -> Path:
    """Return the data file that a checkpoint or cache recorded.

    Tried in this order: as recorded, by its file name in each folder of `beside`, in the working directory.

    Raises:
        MissingFileError: None of them exists; the message asks for `--data`.
    """
    candidates = [Path(recorded), *(folder / Path(recorded).name for folder in beside), Path(Path(recorded).name)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    tried = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise MissingFileError(f"data file {recorded!r} of {purpose} not found (tried {tried}); name it: --data my.yaml")


def load_data(path: Path, *, allow_download: bool = False, train_images: bool = True) -> dict[str, Any]:
    """Return the data mapping as Ultralytics resolves it: absolute `train` and `val`, `names`, `nc`, `channels`.

    A `download:` entry may run code, so it is followed only with `allow_download`. Without `train_images` the folder
    of training images may be missing: a packed cache is trained without them.

    Raises:
        MissingFileError: The file or a folder that it names is missing.
        InputDataError: A key is missing or has a value that cannot be used.
    """
    content = read_yaml(path)
    if not content.get("train"):
        raise InputDataError(
            f"{path} has no `train:` entry; add the folder of training images, e.g. train: images/train"
        )
    if content.get("names") is None and "nc" not in content:
        raise InputDataError(f"{path} has neither `names:` nor `nc:`; add names: [class, …]")
    if not (content.get("val") or content.get("validation")):
        raise InputDataError(f"{path} has no `val:` entry; add the folder of validation images, e.g. val: images/val")
    _check_entries(path, content)
    try:
        data: dict[str, Any] = check_det_dataset(str(path), autodownload=allow_download)
    except FileNotFoundError as error:
        hint = "; its download: entry was not run (allow it: --allow-download)" if content.get("download") else ""
        raise MissingFileError(f"{path}: {_first_line(error)}{hint}") from None
    except (SyntaxError, TypeError, ValueError) as error:
        raise InputDataError(f"{path}: {_first_line(error)}") from None
    except KeyError as error:  # of class names
        raise InputDataError(f"{path}: `names:`: {error.args[0]}") from None
    if data["channels"] != 3:
        raise InputDataError(f"{path}: channels: {data['channels']} is not supported; allowed: 3")
    _check_folders(path, data, ("train", "val") if train_images else ("val",))
    return data


def _check_entries(path: Path, content: dict[str, Any]) -> None:
    """Raise `InputDataError` for values that Ultralytics would take for others, or stumble over."""
    for split in ("train", "val"):
        value = content.get(split)
        if not all(isinstance(entry, str) for entry in (value if isinstance(value, list) else [value or ""])):
            raise InputDataError(f"{path}: `{split}: {value}`; allowed: a folder, a text file, or a list of them")
    names = content.get("names")
    listed = names.values() if isinstance(names, dict) else names if isinstance(names, list) else []
    if wrong := [name for name in listed if not isinstance(name, str | int | float)]:
        raise InputDataError(f"{path}: `names:` holds {wrong[0]!r}; allowed: words")


def _check_folders(path: Path, data: dict[str, Any], splits: tuple[str, ...]) -> None:
    for split in splits:
        for entry in data[split] if isinstance(data[split], list) else [data[split]]:
            folder = Path(entry)
            if not folder.exists():
                raise MissingFileError(f"{path}: `{split}:` names {folder}, which does not exist")
            if folder.is_dir() and not any(_is_image(file) for file in folder.rglob("*.*")):
                formats = ", ".join(sorted(IMG_FORMATS)[:6])
                raise InputDataError(f"{path}: `{split}:` folder {folder} holds no images; allowed: {formats}, …")


def _is_image(file: Path) -> bool:
    return file.suffix[1:].lower() in IMG_FORMATS


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def split_files(data: dict[str, Any], split: str) -> tuple[list[str], list[str]]:
    """Return the images of a split in the order of their names, and where the label of each would be.

    Raises:
        MissingFileError: A text file lists an image that is not there.
    """
    images: list[str] = []
    for entry in data[split] if isinstance(data[split], list) else [data[split]]:
        place = Path(entry)
        if place.is_dir():
            images += [str(file) for file in place.rglob("*.*") if _is_image(file)]
        else:  # a text file of images; those that start with ./ lie beside it
            lines = place.read_text(encoding="utf-8").split()
            images += [str(place.parent / line[2:]) if line.startswith("./") else line for line in lines]
    if missing := next((image for image in images if not Path(image).is_file()), None):
        raise MissingFileError(f"`{split}:` lists {missing}, which is not there; take it off the list or restore it")
    images.sort()
    return images, img2label_paths(images)
