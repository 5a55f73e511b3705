"""In: the student that the user named. Out: nothing, or one line on why no run can start from it."""

from __future__ import annotations

from pathlib import Path

from ultralytics.nn.tasks import yaml_model_load

from cache_kd.errors import MissingFileError, SettingError
from cache_kd.ultralytics_bridge.gate import announce_trusted, check_checkpoint

TRUST = "--trust-student"


def check_student(student: str, *, trusted: bool) -> None:
    """Raise unless the student is a file or one of Ultralytics' own model YAMLs; nothing is downloaded or run.

    Args:
        trusted: the file may run code while it loads; what it would run is said first.

    Raises:
        SettingError, MissingFileError: Not a name of a model, or no such file.
        InputDataError: A checkpoint that cannot be loaded as data.
    """
    path = Path(student)
    if path.suffix not in {".pt", ".yaml", ".yml"} or "://" in student:
        raise SettingError(f"--student {student}; allowed: a model YAML as yolov8n.yaml, or a checkpoint ending in .pt")
    if path.is_file():
        if path.suffix == ".pt":
            check_checkpoint("student", path, trusted=trusted, trust=TRUST)
        elif trusted:
            announce_trusted("student", path)
    elif path.suffix == ".pt" or not _stock_yaml(student):
        raise MissingFileError(
            f"--student {student}: no such file; allowed: an existing file, or a stock YAML as yolov8n.yaml"
        )


def check_resumed(last: Path, *, trusted: bool) -> None:
    """Raise unless every checkpoint that Ultralytics reads in a resumed run's folder can be loaded as data.

    It reads `best.pt`, too, when the run ends, and always as code.
    """
    for file in dict.fromkeys((last, last.with_name("best.pt"), last.with_name("last.pt"))):
        if file.is_file():
            check_checkpoint("checkpoint", file, trusted=trusted, trust=TRUST)


def check_pretrained(pretrained: object, *, trusted: bool) -> None:
    """Raise unless `pretrained=` is a switch or a file here: Ultralytics would download any other."""
    if pretrained is None or isinstance(pretrained, bool):
        return
    path = Path(str(pretrained))
    if "://" in str(pretrained) or path.suffix != ".pt" or not path.is_file():
        raise MissingFileError(
            f"pretrained={pretrained}: no such checkpoint; allowed: an existing .pt file, True, False"
        )
    check_checkpoint("checkpoint", path, trusted=trusted, trust=TRUST)


def _stock_yaml(name: str) -> bool:
    """Return whether `name`, such as yolov8n.yaml, is one of Ultralytics' own model YAMLs, scale letter included."""
    try:
        yaml_model_load(name)
    except (OSError, SyntaxError, TypeError, AttributeError):
        return False
    return True
