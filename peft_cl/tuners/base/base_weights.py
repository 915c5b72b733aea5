"""Which backbone an adapter fits: noted when it is saved, compared when it is loaded."""

from __future__ import annotations

import warnings

from torch import nn

from .config import PromptPoolConfig
from .digests import base_digests, is_another_base
from .encoder import PromptedEncoder
from .merged import merged


def note_base(model: nn.Module, config: PromptPoolConfig) -> None:
    """Write digests of the backbone's weights, as they are now, to the adapter's configuration.

    An adapter that was loaded for inference has learnt nothing here, so what it knows of its backbone stays.
    """
    if config.inference_mode and config.base_weights:
        return
    config.base_weights = base_digests(merged(_encoder(model).base_layer)) or None


def warn_of_another_base(model: nn.Module, config: PromptPoolConfig, adapter_name: str) -> None:
    """Say that an adapter is loaded on other weights than those that it was trained on.

    Adapters of earlier versions say nothing of their weights, and before its first task an adapter fits any.
    """
    if not (config.tasks and config.base_weights and is_another_base(config.base_weights, _encoder(model).base_layer)):
        return
    found = getattr(getattr(model, "config", None), "_name_or_path", "") or "this model"
    trained_on = config.base_model_name_or_path or "a base model that it does not name"
    warnings.warn(
        f"The adapter {adapter_name!r} was trained on other weights than those of {found!r}: on {trained_on!r}, whose "
        "weights were different when the adapter was saved. Prompts and head fit the weights that they were learnt "
        "on, so predictions may be wrong. Load the backbone it was trained on; if that was changed before training "
        "(fine-tuned, or a LoRA merged into it), save the changed one with save_pretrained and load that.",
        UserWarning,
        stacklevel=2,
    )


def _encoder(model: nn.Module) -> PromptedEncoder:
    return next(module for module in model.modules() if isinstance(module, PromptedEncoder))
