"""CODA-Prompt's tuner."""

from __future__ import annotations

from ..base.model import PromptPoolModel
from .pool import CodaPromptPool


class CodaPromptModel(PromptPoolModel):
    """CODA-Prompt on an HF image classifier; made by `get_peft_model(model, CodaPromptConfig())`."""

    prefix = "codaprompt_"
    pool_class = CodaPromptPool
