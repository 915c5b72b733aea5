"""Prompt-pool continual learning for Hugging Face vision models: L2P, DualPrompt and CODA-Prompt as PEFT adapters."""

from __future__ import annotations

from .tuners import (
    CodaPromptConfig,
    CodaPromptModel,
    DualPromptConfig,
    DualPromptModel,
    L2PConfig,
    L2PModel,
    LinearProbeConfig,
    LinearProbeModel,
)


__version__ = "0.1.0"
__all__ = [
    "CodaPromptConfig",
    "CodaPromptModel",
    "DualPromptConfig",
    "DualPromptModel",
    "L2PConfig",
    "L2PModel",
    "LinearProbeConfig",
    "LinearProbeModel",
]
