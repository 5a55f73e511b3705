"""In: the table of losses. Out: what each transfers, needs and costs, and its options, for people and programs."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from cache_kd.losses import LOSSES, DistillLoss


def catalogue() -> list[dict[str, Any]]:
    """Return one mapping a loss: name, title, paper, needs, protocol, cost, default weight, options."""
    return [
        {
            "name": name,
            "title": method.title,
            "paper": method.paper,
            "needs": sorted(method.needs),
            "protocol": method.protocol,
            "cost": method.cost,
            "default_weight": method.default_weight,
            "options": _options(method),
        }
        for name, method in LOSSES.items()
    ]


def table() -> str:
    """Return the catalogue as text."""
    entries = []
    for loss in catalogue():
        defaults = {"weight": loss["default_weight"]}
        defaults |= {name: rule["default"] for name, rule in loss["options"].items()}
        options = ", ".join(f"{name}={value}" for name, value in defaults.items())
        allowed = "; ".join(f"{name}: {rule['allowed']}" for name, rule in loss["options"].items() if rule["allowed"])
        body = [
            f"transfers  {loss['title']}",
            f"paper      {loss['paper']}",
            f"needs      {', '.join(loss['needs'])}",
            f"options    {options}" + (f" ({allowed})" if allowed else ""),
            f"protocol   {loss['protocol']}",
            f"cost       {loss['cost']}",
        ]
        entries.append(f"{loss['name']}\n" + textwrap.indent("\n".join(body), "  "))
    return "\n".join(entries) + "\nuse: cache-kd train --student yolov8n.yaml --loss cwd --loss ld:weight=2"


def _options(method: type[DistillLoss]) -> dict[str, dict[str, Any]]:
    parameters = inspect.signature(method.__init__, eval_str=True).parameters.values()
    return {
        parameter.name: {
            "type": parameter.annotation.__name__,
            "default": parameter.default,
            "allowed": method.allowed[parameter.name].text if parameter.name in method.allowed else "",
        }
        for parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
