"""DualPrompt."""

from __future__ import annotations

from ...registration import register_method
from .config import DualPromptConfig
from .model import DualPromptModel


__all__ = ["DualPromptConfig", "DualPromptModel"]

register_method("dualprompt", DualPromptConfig, DualPromptModel)
