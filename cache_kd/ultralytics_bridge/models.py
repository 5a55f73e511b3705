"""In: the name of a model. Out: whether Ultralytics ships a YAML of it."""

from __future__ import annotations

from ultralytics.nn.tasks import yaml_model_load


def known_model(name: str) -> bool:
    """Return whether `name`, such as yolov8n.yaml, is one of Ultralytics' own model YAMLs, scale letter included."""
    try:
        yaml_model_load(name)
    except (OSError, SyntaxError, TypeError, AttributeError):
        return False
    return True
