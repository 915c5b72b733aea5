"""Clipping the gradients of one part of an adapter by themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import nn

from .learning_rates import PARTS, part_of


def check_norms(norms: dict[str, float] | None) -> None:
    """Raise a `ValueError` for a part that does not exist or a norm that is none."""
    if norms is not None and not isinstance(norms, dict):
        raise ValueError(f"max_grad_norms is {norms!r}, but must be norms by part, such as {{'pool': 1.0}}.")
    for name, norm in (norms or {}).items():
        if name not in PARTS:
            raise ValueError(f"max_grad_norms names {name!r}, but the parts are {', '.join(PARTS)}. Name these.")
        if isinstance(norm, bool) or not isinstance(norm, (int, float)) or not 0 < norm < math.inf:
            raise ValueError(f"max_grad_norms gives {name!r} the norm {norm!r}, but a norm must be a number above 0.")


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
