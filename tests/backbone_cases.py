"""Tiny random models of every family of backbones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from peft_cl.backbones.dinov3 import DINOv3ViTForImageClassification


#: What all of them are, as far as they have it: images (B, 3, 16, 16), 4 patches, 3 layers of width 24.
COMMON = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,  # so large that every part of the input shows in the logits
}
WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "initializer_range": 0.3,
    "drop_path_rate": 0.0,
}
TOWER = {name: value for name, value in COMMON.items() if name != "initializer_range"}
DINOV2 = {**COMMON, "mlp_ratio": 2, "layerscale_value": 0.7, "drop_path_rate": 0.0}
BEIT = {**COMMON, "drop_path_rate": 0.0, "layer_scale_init_value": 0.7}


def _tower(config: str, model: str, **fields: Any) -> Callable[..., PreTrainedModel]:
    def make(**overrides: Any) -> PreTrainedModel:
        vision = {**TOWER, **fields, **{name: value for name, value in overrides.items() if name in TOWER}}
        rest = {name: value for name, value in overrides.items() if name not in vision}
        return getattr(transformers, model)(getattr(transformers, config)(vision_config=vision, **rest))

    return make


def _plain(config: str, model: Any, **fields: Any) -> Callable[..., PreTrainedModel]:
    def make(**overrides: Any) -> PreTrainedModel:
        model_class = getattr(transformers, model) if isinstance(model, str) else model
        return model_class(getattr(transformers, config)(**{**fields, **overrides}))

    return make


MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "vit": _plain("ViTConfig", "ViTForImageClassification", **COMMON),
    "deit": _plain("DeiTConfig", "DeiTForImageClassification", **COMMON),
    "vit_msn": _plain("ViTMSNConfig", "ViTMSNForImageClassification", **COMMON),
    "dinov2": _plain("Dinov2Config", "Dinov2ForImageClassification", **DINOV2),
    "dinov2-swiglu": _plain("Dinov2Config", "Dinov2ForImageClassification", **DINOV2, use_swiglu_ffn=True),
    "dinov2_with_registers": _plain(
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
        **DINOV2,
        num_register_tokens=2,
    ),
    "dinov3_vit": _plain(
        "DINOv3ViTConfig",
        DINOv3ViTForImageClassification,
        **{**COMMON, "num_attention_heads": 2, "layerscale_value": 0.7, "num_register_tokens": 2},
    ),
    "beit": _plain("BeitConfig", "BeitForImageClassification", **BEIT, use_relative_position_bias=True),
    "beit-shared": _plain("BeitConfig", "BeitForImageClassification", **BEIT, use_shared_relative_position_bias=True),
    "beit-absolute": _plain(
        "BeitConfig",
        "BeitForImageClassification",
        **BEIT,
        use_absolute_position_embeddings=True,
        use_mean_pooling=False,
    ),
    "clip": _tower("CLIPConfig", "CLIPForImageClassification", initializer_range=0.3),
    "siglip": _tower("SiglipConfig", "SiglipForImageClassification"),
    "siglip-no-head": _tower("SiglipConfig", "SiglipForImageClassification", vision_use_head=False),
    "swin": _plain("SwinConfig", "SwinForImageClassification", **WINDOWS),
    "swinv2": _plain("Swinv2Config", "Swinv2ForImageClassification", **WINDOWS),
}
#: The first of each family.
FAMILIES = tuple(name for name in MAKERS if "-" not in name)


def tiny_backbone(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random classifier of 12 classes in evaluation mode, the same for the same seed; no weight of it is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MAKERS[name](**{"num_labels": 12, **overrides}).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # some begin as zeros or ones, and would hide what they do
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
