"""In: a model and names of layers. Out: the modules that they name, their taps, and their outputs in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cache_kd.errors import MismatchError
from cache_kd.structures import Tap

STAGE = "C"


def find_layers(model: nn.Module, names: Sequence[str], purpose: str) -> dict[str, nn.Module]:
    """Return the module of each name.

    Args:
        names: "C3", "C4", "C5": the backbone's last layer of stride 8, 16, 32, whatever the architecture; "6": a layer
            by its number in the model's YAML; "6.cv1": a part of it.
        purpose: whose model it is, for the message.

    Raises:
        MismatchError: the model has no such layer.
    """
    found: dict[str, nn.Module] = {}
    stages = backbone_stages(model) if any(name.startswith(STAGE) for name in names) else {}
    for name in names:
        module = stages.get(name) or _submodule(model, name)
        if module is None:
            raise MismatchError(
                f"{purpose} has no layer {name!r}; allowed: {', '.join([*stages, *_stage_names(stages)])} for the "
                f"backbone's stages, a number from 0 to {len(_sequence(model)) - 2} for a layer, or a part of it as "
                "6.cv1"
            )
        found[name] = module
    return found


def _stage_names(stages: Mapping[str, nn.Module]) -> tuple[str, ...]:
    return () if stages else ("C3", "C4", "C5")


def backbone_stages(model: nn.Module) -> dict[str, nn.Module]:
    """Return {"C1": …, "C5": …}: the last layer of each stride among the backbone's, as its YAML divides it."""
    content: Any = getattr(model, "yaml", None) or {}
    depth = len(content.get("backbone", ()))
    layers = {str(number): layer for number, layer in enumerate(_sequence(model)[:depth])}
    return {f"{STAGE}{tap.stride.bit_length() - 1}": layers[tap.name] for tap in taps_of(model, layers, "backbone")}


def taps_of(model: nn.Module, layers: Mapping[str, nn.Module], purpose: str) -> tuple[Tap, ...]:
    """Return the tap of each layer, its channels and stride taken from a forward pass over a blank image.

    Raises:
        MismatchError: a layer has no map for an output, or one whose stride is no whole number.
    """
    parameter = next(model.parameters())
    size = 32 * 2
    blank = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    model.eval()
    with torch.no_grad(), captured(layers) as outputs:
        model(blank)
    model.train(was_training)
    taps = []
    for name in layers:
        output = outputs.get(name)
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        if len(shape) != 4 or shape[2] != shape[3] or size % shape[2]:
            raise MismatchError(
                f"layer {name!r} of {purpose} does not put out one map (B, F, H, W) whose stride is a whole number; "
                "name another layer"
            )
        taps.append(Tap(name, shape[1], size // shape[2]))
    return tuple(taps)


@contextmanager
def captured(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of `layers` by name, with gradient, of the forward pass that runs inside.

    The hooks are gone afterwards: copies and pickles of the model know nothing of them. The output of a normalisation
    is kept as a copy apart, since the activation that follows works in place.

    Raises:
        MismatchError: a layer runs several times, as Ultralytics' activations do, one module in all layers.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
            if name in found:
                raise MismatchError(
                    f"layer {name!r} runs several times in one pass, so its output is not one map; name the layer "
                    "around it, as 6.cv1 for 6.cv1.act"
                )
            found[name] = output
            return output.clone() if isinstance(module, nn.BatchNorm2d) else None

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return the layer or part of a layer that a dotted path names, None if there is none or it is the head's."""
    number, *_ = name.split(".")
    sequence = _sequence(model)
    if not number.isdecimal() or int(number) >= len(sequence) - 1:
        return None
    try:
        return sequence.get_submodule(name)
    except AttributeError:
        return None


def _sequence(model: nn.Module) -> nn.Sequential:
    layers = getattr(model, "model", None)
    assert isinstance(layers, nn.Sequential)  # describe_head refused anything else
    return layers
