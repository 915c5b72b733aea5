"""What the two modules that we put into a base model, the prompted encoder and the head, have in common."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class AdapterLayer(nn.Module, BaseTunerLayer):
    """Wraps a module of the base model and keeps one entry per adapter beside it.

    The entries sit in a `ModuleDict` whose name carries the method's prefix (`l2p_pool`, `l2p_head`): PEFT and
    transformers recognise adapter weights by it.

    Args:
        base_layer: the wrapped module; it is never changed.
        prefix: the method's prefix, for instance `"l2p_"`.
    """

    kind: str
    #: Where the adapter's part goes if the wrapped module has no parameters (a classifier of no labels).
    fallback_device = torch.device("cpu")

    def __init__(self, base_layer: nn.Module, prefix: str):
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = (f"{prefix}{self.kind}",)
        self.other_param_names = ()
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        # A new module is in training mode; put into a model in evaluation mode, it has to be told.
        self.training = self.entries.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        """Attributes that the base model reads from the wrapped module (`self.vit.embeddings`) stay readable."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def entries(self) -> nn.ModuleDict:
        """Adapter name -> this layer's part of the adapter."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def active(self) -> nn.Module | None:
        """The active adapter's part, or None if adapters are disabled or none is active."""
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.entries]
        return self.entries[names[0]] if names else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter. PEFT and transformers both come through here, whichever way the user asked."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"set_adapter got {names}, but one prompt adapter can be active at a time: each has its own head. "
                "Name one."
            )
        super().set_adapter(names, inference_mode=inference_mode)
        for entry in self.entries.values():
            if getattr(entry, "is_frozen", False):
                entry.requires_grad_(False)

    def add_entry(self, adapter_name: str, entry: nn.Module) -> None:
        """Add an adapter's part, on the wrapped module's device and in this layer's mode; it stays float32."""
        self.entries[adapter_name] = entry.train(self.training)
        # With low_cpu_mem_usage the entry is empty yet, and PEFT asks for the move after it has loaded the weights.
        if not any(parameter.is_meta for parameter in entry.parameters()):
            self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Called by PEFT after loading. Unlike PEFT's own, it leaves the dtype: prompts, keys and head are float32
        whatever the backbone is."""
        if adapter_name in self.entries:
            like = next(self.base_layer.parameters(), None)
            device = device or (like.device if like is not None else self.fallback_device)
            self.entries[adapter_name].to(device)


def check_name(adapter_name: str) -> None:
    """Refuse a name of an adapter that is a path: PEFT saves the adapter in a folder of its name."""
    wrong = not isinstance(adapter_name, str) or not adapter_name or set(adapter_name) & set("./\\\0")
    if wrong:
        raise ValueError(
            f"The adapter's name is {str(adapter_name)[:100]!r}, but must be a text without '.', '/' and '\\': it is "
            "saved in a folder of that name. Choose a plain name, such as 'animals'."
        )
