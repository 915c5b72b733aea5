"""Clipping the gradients of one part of an adapter by themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import nn

from .learning_rates import check_by_part, part_of


def check_norms(norms: dict[str, float] | None) -> None:
    """Raise a `ValueError` for a part that does not exist or a norm that is none."""
    check_by_part("max_grad_norms", "norm", norms, "{'pool': 1.0}", "above 0", lambda norm: norm > 0)


def clip_parts(model: nn.Module, norms: Mapping[str, float], accelerator: Accelerator) -> None:
    """Scale the gradients of each part in `norms` down to its norm, where they are longer.

    The Trainer then clips what is left by one common norm (`max_grad_norm`).
    """
    scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()  # fp16: they still have it
    for part, norm in norms.items():
        chosen = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and part_of(name, norms) == part
        ]
        if chosen:
            torch.nn.utils.clip_grad_norm_(chosen, norm * scale)
