"""In: the table of losses and what was measured of them. Out: what each transfers, needs and costs, and its options."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from cache_kd.losses import LOSSES, DistillLoss
from cache_kd.losses.options import written
from cache_kd.losses.spec import COMMON, option_defaults, option_types

MEASURED = Path(__file__).with_name("measured.json")
"""Figures of `scripts/bench/loss_cost.py`, with the setting they belong to."""
WORDS = {float: "float", int: "int", bool: "bool", str: "str", tuple[str, ...]: "list"}


def measured() -> dict[str, Any]:
    """Return the measured figures: their setting, seconds and memory of a step by loss, bytes of a view by need."""
    figures: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return figures


def catalogue() -> list[dict[str, Any]]:
    """Return one mapping a loss: name, title, paper, needs, reads, bytes, protocol, cost, default weight, options.

    `bytes_a_view`, `step_over_plain` and `memory_over_plain` are None for a loss that was not measured.
    """
    figures = measured()
    return [_entry(name, method, figures) for name, method in LOSSES.items()]


def _entry(name: str, method: type[DistillLoss], figures: dict[str, Any]) -> dict[str, Any]:
    cost = figures["losses"].get(name)
    sizes = [figures["bytes_a_view"].get(need) for need in method.needs]
    return {
        "name": name,
        "title": method.title,
        "paper": method.paper,
        "needs": sorted(method.needs),
        "reads": sorted(method.reads),
        "bytes_a_view": None if None in sizes else round(sum(sizes)),
        "protocol": method.protocol,
        "cost": method.cost,
        "step_over_plain": cost and round(cost["step_over_plain"]["median"], 2),
        "memory_over_plain": cost and round(cost["kept_over_plain"], 2),
        "default_weight": method.default_weight,
        "options": _options(method),
    }


def setting() -> str:
    """Return in words what the measured figures belong to."""
    figures = measured()
    return (
        f"measured {figures['date']} on {figures['machine']}: {figures['student']} from {figures['teacher']}, "
        f"{figures['data']}, {figures['imgsz']} px, batch {figures['batch']}, fidelity default"
    )


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
            f"needs      {needs_in_words(loss)}",
            f"options    {options}" + (f" ({allowed})" if allowed else ""),
            f"protocol   {loss['protocol']}",
            f"cost       {cost_in_words(loss)}",
        ]
        entries.append(f"{loss['name']}\n" + textwrap.indent("\n".join(body), "  "))
    common = "; ".join(f"{name}: {option.allowed.text}" for name, option in COMMON.items())
    return "\n".join(
        [
            *entries,
            f"every loss: {common}",
            f"figures: {setting()}",
            "use: cache-kd train --student yolov8n.yaml --loss cwd --loss ld:weight=2,until=50",
        ]
    )


def needs_in_words(loss: dict[str, Any]) -> str:
    """Return what an entry of the catalogue needs, with the bytes of a view that a run reads for it."""
    size = "" if loss["bytes_a_view"] is None else f" ({loss['bytes_a_view'] / 1e3:.0f} kB a view)"
    reads = f"; reads {', '.join(loss['reads'])}" if loss["reads"] else ""
    return ", ".join(loss["needs"]) + size + reads


def cost_in_words(loss: dict[str, Any]) -> str:
    """Return what an entry of the catalogue costs, in words and as measured."""
    if loss["step_over_plain"] is None:
        return str(loss["cost"])
    return (
        f"{loss['cost']}; {loss['step_over_plain']:.2f} of a plain step, {loss['memory_over_plain']:.2f} of its memory"
    )


def _options(method: type[DistillLoss]) -> dict[str, dict[str, Any]]:
    types, defaults = option_types(method), option_defaults(method)
    return {
        name: {
            "type": WORDS[kind],
            "default": written(defaults[name]),
            "allowed": method.allowed[name].text if name in method.allowed else "",
        }
        for name, kind in types.items()
    }
