"""CODA-Prompt."""

from __future__ import annotations

from ...registration import register_method
from .config import CodaPromptConfig
from .model import CodaPromptModel


__all__ = ["CodaPromptConfig", "CodaPromptModel"]

register_method("codaprompt", CodaPromptConfig, CodaPromptModel)
