"""The vision transformers that can be prompted: one row per family. No other place knows their module names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """Where one family of HF image classifiers keeps the parts that prompting touches.

    Attributes:
        model_type: `config.model_type` of the family.
        model_classes: names of the classification models supported.
        encoder: attribute of the classification model that holds the encoder.
        head: attribute of the classification model that holds the classifier.
        embeddings, layers, norm: attributes of the encoder.
        attention, norms, mlp, dropout: attributes of a layer: its attention, the norms before attention and before
            MLP, the MLP, and what both results go through.
        projections: attributes of the attention: queries, keys, values, output.
        special_tokens: tokens in front of the patches (CLS, distillation token ...); the first one is the CLS token.
    """

    model_type: str
    model_classes: tuple[str, ...]
    encoder: str
    head: str = "classifier"
    embeddings: str = "embeddings"
    layers: str = "layers"
    attention: str = "attention"
    norm: str = "layernorm"
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    mlp: str = "mlp"
    dropout: str = "dropout"
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    special_tokens: int = 1

    def embed(self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
        """Token embeddings with positions, (B, special_tokens + patches, D), in the encoder's dtype."""
        embeddings = getattr(encoder, self.embeddings)
        # The frozen model may be bfloat16 while the images are float32, as in the encoder's own forward.
        dtype = embeddings.patch_embeddings.projection.weight.dtype
        return embeddings(pixel_values.to(dtype), interpolate_pos_encoding=interpolate_pos_encoding)

    def layer_list(self, encoder: nn.Module) -> nn.ModuleList:
        return getattr(encoder, self.layers)

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return getattr(layer, self.attention)

    def final_norm(self, encoder: nn.Module) -> nn.Module:
        return getattr(encoder, self.norm)

    def cls_position(self, encoder: nn.Module) -> torch.Tensor:
        """The CLS token's position embedding, (D,)."""
        return getattr(encoder, self.embeddings).position_embeddings[0, 0]

    def present(self, feature: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Put `feature` (B, D) where the family's head reads it: as the first of `tokens` (B, N, D)."""
        return torch.cat([feature[:, None], tokens[:, 1:]], dim=1)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("vit", ("ViTForImageClassification",), encoder="vit"),
        Family("deit", ("DeiTForImageClassification",), encoder="deit", special_tokens=2),
    )
}


def loader_of(config: PreTrainedConfig) -> type:
    """The class whose `from_pretrained` loads a backbone with the one head that prompts need.

    `AutoModelForImageClassification`, but for a distilled DeiT, of which it makes the model with two heads.
    """
    family, made = FAMILIES.get(config.model_type), (config.architectures or [""])[0]
    if family is None or "ForImageClassification" not in made or made in family.model_classes:
        return transformers.AutoModelForImageClassification
    return getattr(transformers, family.model_classes[0], transformers.AutoModelForImageClassification)


def family_of(model: nn.Module) -> Family:
    """Return the family of an HF image-classification model.

    Raises:
        ValueError: the model is of no supported family, or lacks the classification head; the message lists what is
            supported.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> family_of(ViTForImageClassification(ViTConfig(num_hidden_layers=1))).encoder
        'vit'
    """
    supported = ", ".join(sorted(name for family in FAMILIES.values() for name in family.model_classes))
    config = getattr(model, "config", None)
    # PEFT may hand over a plain dict of the config; models always carry the object.
    model_type = getattr(config, "model_type", None)
    name = type(model).__name__
    family = FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"{name} (model_type {model_type!r}) cannot be prompted: prompts are read by self-attention, and the "
            f"supported transformers are {supported}. Choose one of these as the base model."
        )
    if hasattr(model, "get_base_model"):
        raise ValueError(
            f"The base model is a {name}, which carries an adapter already. Call add_adapter or load_adapter on it "
            "for another one of its method, or unload() first."
        )
    if not {base.__name__ for base in type(model).__mro__}.intersection(family.model_classes):
        # Of a distilled DeiT, the Auto class makes the model with two heads.
        loader = family.model_classes[0] if "ForImageClassification" in name else "AutoModelForImageClassification"
        raise ValueError(
            f"{name} is of the supported family {model_type!r}, but prompts need one of its classification models, "
            f"with a single head: {', '.join(family.model_classes)}. Load it with {loader}.from_pretrained(name)."
        )
    return family
