"""Prefix keys and values for one call of one attention module, in any family and any attention implementation.

On a CPU also the length that its attention kernels are fast at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


IMPLEMENTATION = "peft_cl_prefix"
EAGER = "eager_attention_forward"
#: torch's sdpa kernels for CPUs are fast at multiples of this many keys: in bfloat16, on matrix units, batch 16 and 12
#: heads take 8 ms at 201 or 222 keys, 4 ms at 208 or 224.
KEY_BLOCK = 16
#: Spare keys over keys that there are, at most: more of them cost more than they bring.
MOST_SPARE = 1 / 16
#: From this many keys on the kernels go through them in blocks, and nothing is gained.
LONG = 512
HALF_PRECISION = (torch.bfloat16, torch.float16)


class PrefixedConfig:
    """Stands in for an attention module's config during one call: the same config, plus the prefix if there is one.

    HF attention modules look their function up by `config._attn_implementation`. The view answers with ours and leaves
    the real config, which is shared by the whole model and saved with it, untouched.
    """

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any, *prefix: torch.Tensor):
        self.config = config
        self.prefix = prefix

    def __getattr__(self, name: str) -> Any:
        # Not `self.config`: on an instance without state (copy, pickle) that would come back here for ever.
        return getattr(object.__getattribute__(self, "config"), name)


@contextmanager
def prefixed(attention: nn.Module, tokens: torch.Tensor, *prefix: torch.Tensor) -> Iterator[None]:
    """Let `attention` see a prefix in front of its own keys and values for the calls made inside the block.

    Args:
        attention: an HF self-attention module (with `config` and the attention interface).
        tokens: what it is called with; in half precision on a CPU the call goes through `prefix_attention` without a
            prefix too.
        *prefix: keys and values, (B or 1, L, D) rows in the width of the projected keys, D = heads x head size; or
            nothing.

    The module is given back as it was, whatever happens inside: nothing is left behind that could be saved, copied or
    seen by another call.
    """
    if not prefix and not (tokens.device.type == "cpu" and tokens.dtype in HALF_PRECISION):
        yield
        return
    config = attention.config
    attention.config = PrefixedConfig(config, *prefix)
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
    they are. `query`, `key`, `value` are (B, heads, N, head size). Behind the keys there may be spare ones, which the
    mask hides.
    """
    view: PrefixedConfig = module.config
    attend = attention_function(module, view.config)
    length = key.shape[2] + (view.prefix[0].shape[1] if view.prefix else 0)
    plain = attention_mask is None and not kwargs.get("dropout")
    spare = _spare_keys(query, length, bool(view.prefix)) if plain and attend is sdpa_attention_forward else 0
    keys, values = view.prefix or (None, None)
    key, value = _lengthened(key, keys, spare), _lengthened(value, values, spare)
    if spare:
        attention_mask = (torch.arange(length + spare, device=key.device) < length)[None, None, None]
    elif attention_mask is not None and view.prefix:
        attention_mask = open_mask(attention_mask, view.prefix[0].shape[1])
    # Meanwhile the view says what is true: flash attention looks up what to load by the name.
    view._attn_implementation = view.config._attn_implementation
    try:
        return attend(module, query, key, value, attention_mask, **kwargs)
    finally:
        del view._attn_implementation


def attention_function(module: nn.Module, config: Any) -> Callable:
    """The function by which `module` attends under `config`, as HF attention modules look it up."""
    # A subclass of the user's lies in a module of its own.
    homes = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    eager = next((getattr(home, EAGER) for home in homes if hasattr(home, EAGER)), None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)


def _spare_keys(query: torch.Tensor, length: int, has_prefix: bool) -> int:
    """How many keys to put behind `length` of them, so that torch's kernel is faster by more than they cost.

    A prefix is joined to the keys anyway; without one, in float32, copying them costs what the kernel gains. The last
    layer's few queries gain nothing.
    """
    missing = -length % KEY_BLOCK
    gains = query.device.type == "cpu" and query.shape[2] > KEY_BLOCK and length < LONG
    fits = missing <= MOST_SPARE * length and (has_prefix or query.dtype in HALF_PRECISION)
    return missing if gains and fits else 0


def _lengthened(rows: torch.Tensor, prefix: torch.Tensor | None, spare: int) -> torch.Tensor:
    """Keys or values (B, heads, N, head size) with the prefix in front and `spare` zeros behind."""
    batch, heads, _, head_size = rows.shape
    parts = [rows]
    if prefix is not None:
        parts.insert(0, beside(prefix, rows))
    if spare:
        parts.append(rows.new_zeros(()).expand(batch, heads, spare, head_size))
    return torch.cat(parts, dim=2) if len(parts) > 1 else rows


def beside(prefix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A prefix (B or 1, L, D) in the form of keys or values (batch, heads, N, head size) that follow it."""
    batch, heads, _, head_size = rows.shape
    prefix = prefix.to(rows.dtype).unflatten(-1, (heads, head_size)).transpose(1, 2)
    if prefix.shape[0] not in (1, batch):  # Swin: an image's windows lie one behind the other
        prefix = prefix.repeat_interleave(batch // prefix.shape[0], dim=0)
    # Rows shared by the batch are not copied for it.
    return prefix.expand(batch, -1, -1, -1)


def open_mask(mask: torch.Tensor, length: int) -> torch.Tensor:
    """The mask with `length` more keys in front, which every query may read: True in a boolean mask, else 0."""
    return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)


AttentionInterface.register(IMPLEMENTATION, prefix_attention)
