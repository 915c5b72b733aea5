"""The linear probe's tuner, and its empty pool."""

from __future__ import annotations

import torch

from ..base.model import PromptPoolModel
from ..base.pool import PromptPool
from ..base.prompts import Prompts


class EmptyPool(PromptPool):
    """No prompts, no query pass."""

    needs_query = False
    query_is_feature = True
    rows_in_use = 0

    def select(self, query: torch.Tensor | None) -> Prompts:
        return Prompts()


class LinearProbeModel(PromptPoolModel):
    """A growing head on a frozen HF image classifier; made by `get_peft_model(model, LinearProbeConfig())`."""

    prefix = "linearprobe_"
    pool_class = EmptyPool
