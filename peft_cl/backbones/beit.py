"""BEiT: attention is biased by relative positions, and the classifier may read the mean of the patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .family import Family


@dataclass(frozen=True)
class BeitFamily(Family):
    """What the classifier reads is the encoder's `pooler_output`."""

    def why_no_tokens(self, encoder: nn.Module) -> str | None:
        config = encoder.config
        if config.use_relative_position_bias or config.use_shared_relative_position_bias:
            return "BEiT's attention is biased by the relative positions of patches, and a prompt token has none"
        return None

    def embed(
        self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        hidden, _ = super().embed(encoder, pixel_values, interpolate_pos_encoding)
        resolution = tuple(pixel_values.shape[2:])
        bias = None
        if encoder.shared_position_bias is not None:
            window = tuple(side // encoder.config.patch_size for side in resolution)
            bias = encoder.shared_position_bias(window, interpolate_pos_encoding, dim_size=hidden.shape[1])
        return hidden, {
            "attention_mask": bias,
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "resolution": resolution,
        }

    def feature_norm(self, encoder: nn.Module) -> nn.Module:
        pooled = encoder.pooler.layernorm
        return encoder.layernorm if pooled is None else pooled

    def pooler_output(self, encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return encoder.pooler(tokens)


FAMILIES = (
    BeitFamily(
        "beit",
        ("BeitForImageClassification",),
        encoder="beit",
        branches=(("dropout", "drop_path"), ("dropout", "drop_path")),
        interpolates=False,
        unsaid=False,
        reads="mean",
    ),
)
