"""Prompts in 16 bits: in the adapter's file, and in memory those that learn no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from .config import PromptPoolConfig

#: What is stored so. Keys, attention vectors and the query's map decide by small differences of cosines, and take
#: little room: they stay float32, as does the head.
NAMES = ("prompts", "g_prompts", "past_prompts", "past_g_prompts")


def storage_dtype(name: str, config: PromptPoolConfig) -> torch.dtype | None:
    """The number format that a pool's tensor `name` is stored in; None: as it is."""
    if name not in NAMES or config.storage_dtype == "float32":
        return None
    return getattr(torch, config.storage_dtype)


def stored(name: str, values: torch.Tensor, config: PromptPoolConfig) -> torch.Tensor:
    """A pool's tensor `name` as it is stored; itself where that is how it is.

    Raises:
        ValueError: float16 has no room for a value.
    """
    dtype = storage_dtype(name, config)
    if dtype is None or values.dtype == dtype:
        return values
    rounded = values.detach().to(dtype)
    if (rounded.isinf() & values.isfinite()).any():
        raise ValueError(
            f"{name} has values up to {values.detach().abs().max():.4g}, but storage_dtype is "
            f"{config.storage_dtype!r}, which ends at {torch.finfo(dtype).max:,.0f}. Set storage_dtype='bfloat16', "
            "which reaches as far as float32, or train with a lower learning rate."
        )
    return rounded


def round_prompts(pool: nn.Module, config: PromptPoolConfig) -> None:
    """Give a pool's prompts, which stay float32, the values that its file has.

    Called where a task ends, before anything is measured or computed from it: what is measured is what is saved, and a
    run goes on from the same numbers, whether it was interrupted, loaded from the file, or neither.

    Raises:
        ValueError: as `stored`.
    """
    with torch.no_grad():
        for name, values in pool.named_parameters(recurse=False):
            if storage_dtype(name, config) is not None:
                values.copy_(stored(name, values, config))
