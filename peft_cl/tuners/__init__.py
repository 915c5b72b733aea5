"""The methods as PEFT tuners. Importing this package registers them."""

from __future__ import annotations

from .base.bare_models import enter_transformers
from .base.config import PromptPoolConfig
from .base.joining import join_adapters, split_adapter
from .base.model import PromptPoolModel
from .base.pool_size import suggested_pool_size
from .coda import CodaPromptConfig, CodaPromptModel
from .dualprompt import DualPromptConfig, DualPromptModel
from .l2p import L2PConfig, L2PModel
from .linear_probe import LinearProbeConfig, LinearProbeModel


__all__ = [
    "CodaPromptConfig",
    "CodaPromptModel",
    "DualPromptConfig",
    "DualPromptModel",
    "L2PConfig",
    "L2PModel",
    "LinearProbeConfig",
    "LinearProbeModel",
    "PromptPoolConfig",
    "PromptPoolModel",
    "join_adapters",
    "split_adapter",
    "suggested_pool_size",
]

enter_transformers()
