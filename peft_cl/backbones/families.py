"""The families of backbones that are known, and which of them a model is of."""

from __future__ import annotations

import transformers
from torch import nn
from transformers import PreTrainedConfig

from . import beit, clip, dinov2, dinov3, swin, swinv2, timm, vit
from .family import Family
from .features_only import attention_in, features_only


#: `config.model_type` -> family.
FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known, so that prompts go into its models.

    Raises:
        ValueError: a family of this `model_type` is known already.

    Example:
        >>> register_family(Family("my_vit", ("MyViTForImageClassification",), encoder="vit"))    # doctest: +SKIP
    """
    if family.model_type in FAMILIES:
        raise ValueError(
            f"A family of model_type {family.model_type!r} is known already. Give yours the model_type of its own "
            "configuration class."
        )
    FAMILIES[family.model_type] = family


for module in (vit, dinov2, dinov3, beit, clip, swin, swinv2, timm):
    for known in module.FAMILIES:
        register_family(known)


def supported_models() -> list[str]:
    """Names of the classification models that can be prompted."""
    return sorted({name for family in FAMILIES.values() for name in family.model_classes})


def loader_of(config: PreTrainedConfig) -> type:
    """The class whose `from_pretrained` loads a backbone with the one head that prompts need.

    `AutoModelForImageClassification`, but for ViT-MAE, of which it makes none, and a distilled DeiT, of which it makes
    one with two heads.
    """
    auto = transformers.AutoModelForImageClassification
    family, made = FAMILIES.get(config.model_type), (config.architectures or [""])[0]
    if family is None:
        return auto
    has_auto = type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if has_auto and ("ForImageClassification" not in made or made in family.model_classes):
        return auto
    return getattr(transformers, family.model_classes[0], auto)


def family_of(model: nn.Module, *, prompts: bool = True) -> Family:
    """Return the family of an HF image-classification model.

    Args:
        prompts: whether it is to carry prompts. Without them any classifier will do whose encoder returns pooled
            features, a convolutional one too.

    Raises:
        ValueError: the model is of no supported family, or lacks the classification head; the message lists what is
            supported.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> family_of(ViTForImageClassification(ViTConfig(num_hidden_layers=1))).encoder
        'vit'
    """
    config = getattr(model, "config", None)
    # PEFT may hand over a plain dict of the config; models always carry the object.
    model_type = getattr(config, "model_type", None)
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ValueError(
            f"The base model is a {name}, which carries an adapter already. Call add_adapter or load_adapter on it "
            "for another one of its method, or unload() first."
        )
    family = FAMILIES.get(model_type)
    reason = _why_not(model, family)
    if reason is None:
        return family
    if prompts or (family is not None and not _is_of(model, family)):
        raise ValueError(reason)
    found = (family and family.without_prompts(model)) or features_only(model)
    if isinstance(found, str):
        if family is not None:
            raise ValueError(reason)
        raise ValueError(f"{name} (model_type {model_type!r}) gives no features that a head could read: {found}.")
    return found


def _why_not(model: nn.Module, family: Family | None) -> str | None:
    """Why the model cannot be prompted, with a remedy; None: it can."""
    name, model_type = type(model).__name__, getattr(getattr(model, "config", None), "model_type", None)
    if family is None:
        found = attention_in(model)
        lacking = f"its attention ({found}) is of a form that is not described here" if found else "it has none"
        remedy = (
            " To describe it takes one file: see register_family and examples/custom_backbone.py." if found else ""
        )
        return (
            f"{name} (model_type {model_type!r}) cannot be prompted: prompts are read by self-attention, and "
            f"{lacking}. Choose one of the supported transformers: {', '.join(supported_models())}.{remedy} Without "
            "prompts it can be used all the same: LinearProbeConfig, whose preset 'best' computes a head from its "
            "features, and the comparison methods."
        )
    if not _is_of(model, family):
        # Of a distilled DeiT, the Auto class makes the model with two heads; of ViT-MAE it makes none.
        needed = family.model_classes[0]
        auto = "ForImageClassification" not in name and model_type not in ("vit_mae",)
        loader = "AutoModelForImageClassification" if auto else needed
        return (
            f"{name} is of the supported family {model_type!r}, but prompts need one of its classification models, "
            f"with a single head: {', '.join(family.model_classes)}. Load it with {loader}.from_pretrained(name)."
        )
    reason = family.why_not(model)
    return reason and f"{name} cannot be prompted: {reason}."


def _is_of(model: nn.Module, family: Family) -> bool:
    return not {base.__name__ for base in type(model).__mro__}.isdisjoint(family.model_classes)
