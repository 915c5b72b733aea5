"""DualPrompt."""

from __future__ import annotations

from ...registration import add_peft_type, register_method


add_peft_type("DUALPROMPT")

from .config import DualPromptConfig  # noqa: E402  (the config names its PEFT type)
from .model import DualPromptModel  # noqa: E402


__all__ = ["DualPromptConfig", "DualPromptModel"]

register_method("dualprompt", DualPromptConfig, DualPromptModel)
