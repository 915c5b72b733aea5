"""L2P's tuner."""

from __future__ import annotations

from ..base.model import PromptPoolModel
from .pool import L2PPool


class L2PModel(PromptPoolModel):
    """Learning to Prompt on an HF image classifier; made by `get_peft_model(model, L2PConfig())`."""

    prefix = "l2p_"
    pool_class = L2PPool
