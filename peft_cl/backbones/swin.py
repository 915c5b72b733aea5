"""Swin: attention in windows, layers that grow wider from stage to stage, and no CLS token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .family import Family
from .geometry import Geometry


@dataclass(frozen=True)
class SwinFamily(Family):
    """A layer is a block of a stage. A prefix is read in each window; the query is the mean of the last tokens."""

    def geometry(self, encoder: nn.Module) -> Geometry:
        sizes = tuple(layer.layernorm_before.normalized_shape[0] for layer in self.layer_list(encoder))
        return replace(super().geometry(encoder), layer_sizes=sizes)

    def why_no_tokens(self, encoder: nn.Module) -> str | None:
        return "Swin divides tokens into windows of an image's grid, in which a prompt token has no place"

    def layer_list(self, encoder: nn.Module) -> list[nn.Module]:
        return [block for stage in encoder.encoder.layers for block in stage.blocks]

    def embed(
        self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        (hidden, dimensions), _ = super().embed(encoder, pixel_values, interpolate_pos_encoding)
        return hidden, {"input_dimensions": dimensions}

    def after(
        self, encoder: nn.Module, index: int, hidden: torch.Tensor, arguments: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        end = -1
        for stage in encoder.encoder.layers:
            end += len(stage.blocks)
            if index == end and stage.downsample is not None:
                height, width = arguments["input_dimensions"]
                hidden = stage.downsample(hidden, (height, width))
                return hidden, {"input_dimensions": ((height + 1) // 2, (width + 1) // 2)}
        return hidden, arguments

    def pooler_output(self, encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return torch.flatten(encoder.pooler(tokens.transpose(1, 2)), 1)

    def output(self, tokens: torch.Tensor, pooler_output, hidden_states=None, attentions=None) -> Any:
        from transformers.models.swin.modeling_swin import SwinModelOutput  # where it is wanted: it takes its time

        return SwinModelOutput(tokens, pooler_output, hidden_states, attentions)


FAMILIES = (
    SwinFamily("swin", ("SwinForImageClassification",), encoder="swin", special_tokens=0, unsaid=False, reads="mean"),
)
