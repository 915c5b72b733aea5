"""CODA-Prompt."""

from __future__ import annotations

from ...registration import add_peft_type, register_method


add_peft_type("CODAPROMPT")

from .config import CodaPromptConfig  # noqa: E402  (the config names its PEFT type)
from .model import CodaPromptModel  # noqa: E402


__all__ = ["CodaPromptConfig", "CodaPromptModel"]

register_method("codaprompt", CodaPromptConfig, CodaPromptModel)
