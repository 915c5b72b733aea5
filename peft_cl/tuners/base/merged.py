"""Layers of PEFT's other methods in the backbone, where a strategy has put such: found, and merged."""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def layers_of_others(backbone: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers of LoRA, OSF, ... in the backbone, by their names in it."""
    return {name: part for name, part in backbone.named_modules() if isinstance(part, BaseTunerLayer)}


def parameters_of_others(backbone: nn.Module) -> list[nn.Parameter]:
    """What such layers add to the backbone's own weights."""
    layers = layers_of_others(backbone).values()
    parts = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    return [value for part in parts for value in part.parameters()]


def merged(backbone: nn.Module) -> nn.Module:
    """The backbone without such layers: a copy with what they add merged into the weights, as PEFT merges it; the
    backbone itself if it has none. The original is not touched: to merge and unmerge would round its weights."""
    if not layers_of_others(backbone):
        return backbone
    found = copy.deepcopy(backbone)
    for name, layer in layers_of_others(found).items():
        layer.merge()
        found.set_submodule(name, layer.get_base_layer())
    return found
