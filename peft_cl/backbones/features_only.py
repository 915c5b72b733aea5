"""Any other HF image classifier, convolutional ones too: nothing is prompted, and a head reads its pooled features."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .family import Family
from .geometry import Geometry


#: Names of a classifier among the parts of HF models.
CLASSIFIERS = ("classifier", "head", "fc")


@dataclass(frozen=True)
class FeaturesOnly(Family):
    """A model whose encoder returns `pooler_output`, and whose classifier reads it.

    To the passes it is a model of one layer that does nothing, with one token: what the encoder has pooled.
    """

    layer: nn.Module | None = None
    width: int = 0

    def geometry(self, encoder: nn.Module) -> Geometry:
        return Geometry(self.width, num_layers=1, has_cls=False, reads_cls=False)

    def hidden_size(self, encoder: nn.Module) -> int:
        return self.width

    def layer_list(self, encoder: nn.Module) -> list[nn.Module]:
        return [self.layer]

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return layer

    def prefixed(self, layer: nn.Module, hidden: torch.Tensor, *prefix: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def below_layers(self, encoder: nn.Module) -> list[nn.Module]:
        return [encoder]

    def feature_norm(self, encoder: nn.Module) -> nn.Module:
        return self.layer

    def embed(
        self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        dtype = next(encoder.parameters()).dtype
        return encoder(pixel_values.to(dtype), **options).pooler_output.flatten(1)[:, None], {}

    def cls(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0]

    def mean(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0]

    def last_hidden_state(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def pooled(self, encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0]


def attention_in(model: nn.Module) -> str | None:
    """The class of the first module that looks like self-attention."""
    found = (type(part).__name__ for part in model.modules() if "attention" in type(part).__name__.lower())
    return next(found, None)


def features_only(model: nn.Module) -> FeaturesOnly | str:
    """How to read the features of `model`; or a sentence that says why it cannot be done."""
    prefix = getattr(model, "base_model_prefix", "")
    encoder = getattr(model, prefix, None) if prefix else None
    head = next((name for name in CLASSIFIERS if isinstance(getattr(model, name, None), nn.Module)), None)
    if encoder is None or head is None:
        return "its encoder and its classifier are not two parts of it"
    linear = [module for module in getattr(model, head).modules() if isinstance(module, nn.Linear)]
    if len(linear) != 1:
        return f"its classifier has {len(linear)} linear layers, not one"
    config = getattr(model, "config", None)
    sides = getattr(config, "image_size", None) or 224
    sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
    weight = next(encoder.parameters())
    image = torch.zeros(1, getattr(config, "num_channels", 3), *sides, device=weight.device, dtype=weight.dtype)
    training = encoder.training
    try:
        with torch.no_grad():
            pooled = getattr(encoder.eval()(image), "pooler_output", None)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"its encoder does not take images alone ({error})"
    finally:
        encoder.train(training)
    if pooled is None or pooled.flatten(1).shape[1] != linear[0].in_features:
        return "its classifier does not read the encoder's pooler_output"
    model_type = getattr(config, "model_type", "")
    # Without attention there are no positions either, and images may be of any size.
    interpolates = attention_in(encoder) is not None
    names, width = (type(model).__name__,), linear[0].in_features
    return FeaturesOnly(model_type, names, prefix, head, interpolates=interpolates, layer=nn.Identity(), width=width)
