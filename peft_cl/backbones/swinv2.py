"""Swin v2: as Swin, with cosine attention in a form of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .attention import beside, open_mask
from .swin import SwinFamily


@dataclass(frozen=True)
class Swinv2Family(SwinFamily):
    """Its attention does not go through the attention interface of transformers."""

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return layer.attention.self

    def checkpointing(self, encoder: nn.Module, layer: nn.Module) -> nn.Module:
        return encoder.encoder

    @contextmanager
    def prefixed(self, layer: nn.Module, hidden: torch.Tensor, *prefix: torch.Tensor) -> Iterator[None]:
        if not prefix:
            yield
            return
        attention = self.attention_of(layer)
        attention.forward = partial(cosine_attention, attention, prefix)
        try:
            yield
        finally:
            del attention.forward

    def output(self, tokens: torch.Tensor, pooler_output, hidden_states=None, attentions=None) -> Any:
        from transformers.models.swinv2.modeling_swinv2 import Swinv2ModelOutput

        return Swinv2ModelOutput(tokens, pooler_output, hidden_states, attentions)


def cosine_attention(
    module: nn.Module,
    prefix: tuple[torch.Tensor, torch.Tensor],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[torch.Tensor, ...]:
    """`Swinv2SelfAttention.forward` with a prefix (Liu et al. 2022, eq. 2: cosine of query and key, over tau, + bias).

    A prefix has no position. Its bias is what the network's bias is where it says nothing, 16 sigmoid(0) = 8: with a
    bias of 0 a prefix would weigh e^-8 of a patch.

    Args:
        prefix: keys and values, (B or 1, L, D).
        hidden_states: (B windows, N, D).
        attention_mask: (windows, N, N) or None.
    """
    length = hidden_states.shape[1]
    heads = module.num_attention_heads

    def split(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = (split(project(hidden_states)) for project in (module.query, module.key, module.value))
    key, value = (torch.cat([beside(rows, own), own], dim=2) for rows, own in zip(prefix, (key, value), strict=True))
    scale = module.logit_scale.clamp(max=math.log(1 / 0.01)).exp()
    scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * scale
    table = module.continuous_position_bias_mlp(module.relative_coords_table).view(-1, heads)
    bias = table[module.relative_position_index.view(-1)].view(length, length, heads).permute(2, 0, 1)
    scores = scores + F.pad(16 * torch.sigmoid(bias), (key.shape[2] - length, 0), value=8.0)
    if attention_mask is not None:  # added twice, as transformers does
        mask = open_mask(2 * attention_mask, key.shape[2] - length)
        scores = scores.unflatten(0, (-1, len(mask))) + mask[:, None]
        scores = scores.flatten(0, 1)
    weights = module.dropout(scores.softmax(dim=-1))
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    return (mixed, weights) if output_attentions else (mixed,)


FAMILIES = (
    Swinv2Family(
        "swinv2", ("Swinv2ForImageClassification",), encoder="swinv2", special_tokens=0, unsaid=False, reads="mean"
    ),
)
