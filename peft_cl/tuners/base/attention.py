"""Prefix keys and values for one call of one attention module, in any family and any attention implementation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


IMPLEMENTATION = "peft_cl_prefix"


class PrefixedConfig:
    """Stands in for an attention module's config during one call: the same config, plus the prefix.

    HF attention modules look their function up by `config._attn_implementation`. The view answers with ours and leaves
    the real config, which is shared by the whole model and saved with it, untouched.
    """

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any, keys: torch.Tensor, values: torch.Tensor):
        self.config = config
        self.keys = keys
        self.values = values

    def __getattr__(self, name: str) -> Any:
        # Not `self.config`: on an instance without state (copy, pickle) that would come back here for ever.
        return getattr(object.__getattribute__(self, "config"), name)


@contextmanager
def prefixed(attention: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> Iterator[None]:
    """Let `attention` see `keys` and `values` in front of its own for the calls made inside the block.

    Args:
        attention: an HF self-attention module (with `config` and the attention interface).
        keys, values: (B or 1, L, D) rows in the width of the projected keys; D = heads x head size.

    The module is given back as it was, whatever happens inside: nothing is left behind that could be saved, copied or
    seen by another call.
    """
    config = attention.config
    attention.config = PrefixedConfig(config, keys, values)
    try:
        yield
    finally:
        attention.config = config


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function under the name `peft_cl_prefix`: add the prefix, then the user's own implementation.

    Prefix-tuning after the projection (Wang et al. 2022, DualPrompt, eq. 4): queries and the sequence length stay as
    they are. `query`, `key`, `value` are (B, heads, N, head size).
    """
    view: PrefixedConfig = module.config
    key = torch.cat([_as_heads(view.keys, key), key], dim=2)
    value = torch.cat([_as_heads(view.values, value), value], dim=2)
    if attention_mask is not None:
        # The prefix may be read by every query; a boolean mask says so with True, an additive one with 0.
        readable = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask, (view.keys.shape[1], 0), value=readable)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(view.config._attn_implementation, eager)
    # Meanwhile the view says what is true: flash attention looks up what to load by the name.
    view._attn_implementation = view.config._attn_implementation
    try:
        return attend(module, query, key, value, attention_mask, **kwargs)
    finally:
        del view._attn_implementation


def _as_heads(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B or 1, L, D) -> (B, heads, L, head size) in the dtype of `like`, without copying rows shared by the batch."""
    batch, heads, _, head_size = like.shape
    rows = rows.to(like.dtype).unflatten(-1, (heads, head_size)).transpose(1, 2)
    return rows.expand(batch, -1, -1, -1)


AttentionInterface.register(IMPLEMENTATION, prefix_attention)
