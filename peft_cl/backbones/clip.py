"""The vision towers of CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .family import Family


@dataclass(frozen=True)
class ClipFamily(Family):
    """The final norm is for the CLS token alone; the classifier reads patches as the last layer leaves them."""

    def image_config(self, model: nn.Module) -> Any:
        return model.config.vision_config

    def below_layers(self, encoder: nn.Module) -> list[nn.Module]:
        return [encoder.embeddings, encoder.pre_layrnorm]

    def cls_position(self, encoder: nn.Module) -> torch.Tensor:
        return encoder.embeddings.position_embedding.weight[0]

    def embed(self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool):
        hidden, arguments = super().embed(encoder, pixel_values, interpolate_pos_encoding)
        return encoder.pre_layrnorm(hidden), arguments

    def last_hidden_state(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@dataclass(frozen=True)
class SiglipFamily(Family):
    """There is no CLS token: an attention with one learnt query pools the tokens, where the checkpoint has it."""

    def image_config(self, model: nn.Module) -> Any:
        return model.config.vision_config

    def has_cls(self, encoder: nn.Module) -> bool:
        return encoder.use_head

    def cls(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return encoder.head(encoder.post_layernorm(hidden)) if encoder.use_head else self.mean(encoder, hidden)


@dataclass(frozen=True)
class NaFlexFamily(SiglipFamily):
    """SigLIP 2 with images of any shape, which needs more of the processor than pixels."""

    def why_not(self, model: nn.Module) -> str | None:
        return (
            "SigLIP 2 in its NaFlex form reads patches, a mask and shapes in the place of images. Take a SigLIP 2 "
            "checkpoint of a fixed size, such as google/siglip2-base-patch16-224, which is loaded as "
            "SiglipForImageClassification"
        )


TOWER = {
    "encoder": "vision_model",
    "layers": "encoder.layers",
    "norm": "post_layernorm",
    "attention": "self_attn",
    "norms": ("layer_norm1", "layer_norm2"),
    "branches": ((), ()),
    "projections": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "arguments": {"attention_mask": None},
    "reads": "mean",
}

FAMILIES = (
    ClipFamily("clip", ("CLIPForImageClassification",), **TOWER),
    SiglipFamily("siglip", ("SiglipForImageClassification",), **TOWER, special_tokens=0, unsaid=False),
    NaFlexFamily("siglip2", ("Siglip2ForImageClassification",), **TOWER, special_tokens=0),
)
