"""Modes of a backbone's modules: what draws random numbers, evaluation for a while, whose checkpointing it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


def draws(module: nn.Module) -> bool:
    """Whether the module draws random numbers in training."""
    rates = ("p", "attention_dropout", "dropout", "drop_prob")
    return any(isinstance(rate, float) and rate > 0 for rate in (getattr(module, name, None) for name in rates))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Compute in the precision of the weights inside the block.

    Where there is no autocast to turn off, nothing is done: a program with a block that turns out empty (a pool that
    chooses nothing) is exported, but cannot be loaded.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout and drop-path off inside the block, and give every module its own mode back afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


@contextmanager
def without_own_checkpointing(layer: nn.Module) -> Iterator[None]:
    """The layer's forward is checkpointed by us, with its prefix, or needs no checkpoint; it must not do so itself."""
    if not getattr(layer, "gradient_checkpointing", False):
        yield
        return
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = True
