"""DualPrompt's tuner."""

from __future__ import annotations

from ..base.model import PromptPoolModel
from .pool import DualPromptPool


class DualPromptModel(PromptPoolModel):
    """DualPrompt on an HF image classifier; made by `get_peft_model(model, DualPromptConfig())`."""

    prefix = "dualprompt_"
    pool_class = DualPromptPool
