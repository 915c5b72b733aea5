"""DINOv3 (ViT): rotary positions, registers, and a classification model, which transformers does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, DINOv3ViTConfig, DINOv3ViTModel, DINOv3ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from .dinov2 import DINO, Dinov2Family


class DINOv3ViTForImageClassification(DINOv3ViTPreTrainedModel):
    """DINOv3 with a linear classifier on the CLS token and the mean of the patches, as DINOv2's (Oquab et al. 2023).

    `AutoModelForImageClassification.from_pretrained` makes it of a DINOv3 checkpoint once peft_cl is imported.

    Example:
        >>> from transformers import DINOv3ViTConfig
        >>> small = DINOv3ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=5)
        >>> DINOv3ViTForImageClassification(small).classifier
        Linear(in_features=64, out_features=5, bias=True)
    """

    base_model_prefix = "dinov3_vit"

    def __init__(self, config: DINOv3ViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov3_vit = DINOv3ViTModel(config)
        size = 2 * config.hidden_size
        self.classifier = nn.Linear(size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.dinov3_vit.get_input_embeddings()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput | tuple:
        """(B, channels, height, width) -> logits (B, classes), and the loss where labels (B,) are given."""
        return_dict = kwargs.pop("return_dict", None)
        outputs = self.dinov3_vit(pixel_values, **kwargs)
        tokens = outputs.last_hidden_state
        patches = tokens[:, 1 + self.config.num_register_tokens :]
        logits = self.classifier(torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if return_dict in (None, True) else output.to_tuple()


AutoModelForImageClassification.register(DINOv3ViTConfig, DINOv3ViTForImageClassification, exist_ok=True)


@dataclass(frozen=True)
class Dinov3Family(Dinov2Family):
    """Patches are turned by their positions in each attention; the tokens in front of them, prompts too, are not."""

    def below_layers(self, encoder: nn.Module) -> list[nn.Module]:
        return [encoder.embeddings, encoder.rope_embeddings]

    def draws_positions(self, encoder: nn.Module) -> bool:
        config = encoder.config
        drawn = (config.pos_embed_shift, config.pos_embed_jitter, config.pos_embed_rescale)
        return encoder.rope_embeddings.training and any(value is not None for value in drawn)

    def embed(
        self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        pixel_values = pixel_values.to(encoder.embeddings.patch_embeddings.weight.dtype)
        positions = encoder.rope_embeddings(pixel_values)
        return encoder.embeddings(pixel_values), {"position_embeddings": positions}


FAMILIES = (
    Dinov3Family(
        "dinov3_vit",
        ("DINOv3ViTForImageClassification",),
        encoder="dinov3_vit",
        layers="model.layer",
        norm="norm",
        **DINO,
    ),
)
