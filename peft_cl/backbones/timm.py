"""timm's ViT, DeiT, EVA and Swin families, in the wrapper that transformers has for them (timm is an extra)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .attention import beside, open_mask
from .family import Family
from .features_only import FeaturesOnly
from .geometry import Geometry


#: What `TimmWrapperForImageClassification` calls its model, and what we call the classifier that we take out of it.
ENCODER, HEAD = "timm_model", "classifier"


class Pooled(NamedTuple):
    """What stands for an encoder's output: timm's classifiers read this alone."""

    pooler_output: torch.Tensor


class HeadInside:
    """The model inside the wrapper has a classifier of its own, which is taken out of it while there is an adapter."""

    def places(self) -> list[str]:
        return [ENCODER]

    def head_of(self, model: nn.Module) -> nn.Module:
        return getattr(model, HEAD) if hasattr(model, HEAD) else getattr(model, ENCODER).get_classifier()

    def put_head(self, model: nn.Module, head: nn.Module) -> None:
        _exchange(_inside(model), head.base_layer, nn.Identity())
        setattr(model, HEAD, head)

    def give_head_back(self, model: nn.Module, classifier: nn.Module) -> None:
        encoder = _inside(model)
        _exchange(encoder, encoder.get_classifier(), classifier)
        delattr(model, HEAD)

    def answer(self, output: Any, classify: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return classify(output if isinstance(output, torch.Tensor) else output.pooler_output)


@dataclass(frozen=True)
class TimmFamily(HeadInside, Family):
    """ViT, DeiT and EVA, whose blocks are in one row, and Swin, whose blocks are in stages."""

    # ----------------------------------------------------------------------------------------------- facts

    def why_not(self, model: nn.Module) -> str | None:
        encoder = _inside(model)
        layers = self.layer_list(encoder)
        if not layers or not all(hasattr(layer, "attn") and hasattr(layer.attn, "fused_attn") for layer in layers):
            return (
                f"the blocks of timm's {type(encoder).__name__} are not attention and MLP as in its ViT, EVA and Swin"
            )
        if not isinstance(self.head_of(model), nn.Module):
            return (
                "it is a distilled DeiT with two heads, which cannot be trained as one; take one that is not distilled"
            )
        if getattr(encoder, "rope_mixed", False):
            return "its rotary positions are others in each layer"
        return None

    remedy_for_size: ClassVar[str] = (
        "make the model for it: model_args={'img_size': ...} or {'dynamic_img_size': True}"
    )

    def image_config(self, model: nn.Module) -> SimpleNamespace:
        encoder = _inside(model)
        patches = encoder.patch_embed
        size = None if getattr(encoder, "dynamic_img_size", False) else getattr(patches, "img_size", None)
        channels = patches.proj.in_channels if hasattr(patches, "proj") else 3
        return SimpleNamespace(image_size=size, patch_size=getattr(patches, "patch_size", 1), num_channels=channels)

    def geometry(self, encoder: nn.Module) -> Geometry:
        sizes = tuple(_width(layer) for layer in self.layer_list(encoder))
        found = replace(super().geometry(encoder), own_width=encoder.num_features, reads_cls=False)
        return replace(found, layer_sizes=sizes) if is_swin(encoder) else found

    def hidden_size(self, encoder: nn.Module) -> int:
        return encoder.num_features

    def num_special(self, encoder: nn.Module) -> int:
        return getattr(encoder, "num_prefix_tokens", 0)

    def has_cls(self, encoder: nn.Module) -> bool:
        return getattr(encoder, "cls_token", None) is not None

    def why_no_tokens(self, encoder: nn.Module) -> str | None:
        if is_swin(encoder):
            return "Swin divides tokens into windows of an image's grid, in which a prompt token has no place"
        if getattr(encoder, "rope", None) is not None:
            return "timm's rotary positions are for a fixed number of tokens in front of the patches"
        return None

    # ----------------------------------------------------------------------------------------------- parts

    def layer_list(self, encoder: nn.Module) -> list[nn.Module]:
        if is_swin(encoder):
            return [block for stage in encoder.layers for block in stage.blocks]
        return list(getattr(encoder, "blocks", ()))

    def below_layers(self, encoder: nn.Module) -> list[nn.Module]:
        names = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
        return [getattr(encoder, name) for name in names if getattr(encoder, name, None) is not None]

    def feature_norm(self, encoder: nn.Module) -> nn.Module:
        # With mean pooling the norm comes behind it.
        return getattr(encoder, "fc_norm", encoder.norm) if isinstance(encoder.norm, nn.Identity) else encoder.norm

    def cls_position(self, encoder: nn.Module) -> torch.Tensor:
        if encoder.pos_embed is None or encoder.no_embed_class or not self.has_cls(encoder):
            return next(encoder.parameters()).new_zeros(())
        return encoder.pos_embed[0, 0]

    def checkpointing(self, encoder: nn.Module, layer: nn.Module) -> SimpleNamespace:
        wanted = any(getattr(part, "grad_checkpointing", False) for part in (encoder, *getattr(encoder, "layers", ())))
        once = partial(checkpoint, use_reentrant=False)
        return SimpleNamespace(gradient_checkpointing=wanted, _gradient_checkpointing_func=once)

    # ----------------------------------------------------------------------------------------------- the passes

    def embed(
        self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        hidden = encoder.patch_embed(pixel_values.to(next(encoder.parameters()).dtype))
        if is_swin(encoder):
            return hidden, {}
        hidden = encoder._pos_embed(hidden)
        arguments = {}
        if isinstance(hidden, tuple):  # EVA: with rotary positions
            hidden, rope = hidden
            arguments = {"rope": rope}
        else:
            hidden = encoder.patch_drop(hidden)
        return encoder.norm_pre(hidden), arguments

    def after(
        self, encoder: nn.Module, index: int, hidden: torch.Tensor, arguments: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        if is_swin(encoder):
            ends, end = {}, -1
            for stage, following in zip(encoder.layers[:-1], encoder.layers[1:], strict=True):
                end += len(stage.blocks)
                ends[end] = following.downsample
            if index in ends:
                hidden = ends[index](hidden)
        return hidden, arguments

    @contextmanager
    def prefixed(self, layer: nn.Module, hidden: torch.Tensor, *prefix: torch.Tensor) -> Iterator[None]:
        if not prefix:
            yield
            return
        fused, layer.attn.fused_attn = layer.attn.fused_attn, True
        try:
            with PrefixedAttention(*prefix):
                yield
        finally:
            layer.attn.fused_attn = fused

    # ----------------------------------------------------------------------------------------------- what is read

    def cls(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if not self.has_cls(encoder):
            return self.mean(encoder, hidden)
        return self.feature_norm(encoder)(hidden[:, 0])

    def mean(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        patches = hidden.flatten(1, 2) if is_swin(encoder) else hidden[:, self.num_special(encoder) :]
        return self.feature_norm(encoder)(patches).mean(1)

    def last_hidden_state(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return encoder.norm(hidden)

    def pooler_output(self, encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return encoder.forward_head(tokens, pre_logits=True)

    def output(self, tokens: torch.Tensor, pooler_output, hidden_states=None, attentions=None) -> Pooled:
        return Pooled(pooler_output)

    def without_prompts(self, model: nn.Module) -> Family | None:
        encoder = getattr(model, ENCODER)
        if not isinstance(self.head_of(model), nn.Linear):
            return None
        return TimmFeatures(*self._names(), layer=nn.Identity(), width=encoder.num_features)

    def _names(self) -> tuple[str, tuple[str, ...], str, str]:
        return self.model_type, self.model_classes, self.encoder, self.head


@dataclass(frozen=True)
class TimmFeatures(HeadInside, FeaturesOnly):
    """Any other model of timm: what its classifier would read."""

    def image_config(self, model: nn.Module) -> SimpleNamespace:
        return SimpleNamespace(image_size=None, num_channels=3)

    def embed(
        self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        hidden = encoder.forward_features(pixel_values.to(next(encoder.parameters()).dtype))
        return encoder.forward_head(hidden, pre_logits=True)[:, None], {}

    def output(self, tokens: torch.Tensor, pooler_output, hidden_states=None, attentions=None) -> Pooled:
        return Pooled(tokens[:, 0])


class PrefixedAttention(TorchFunctionMode):
    """While it is active, `scaled_dot_product_attention` sees keys and values (B or 1, L, D) in front of its own.

    timm's attention modules, ViT's, EVA's and Swin's, all end in that one function; queries, norms of keys and rotary
    positions stay theirs. A prefix may be read by every query.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.prefix = keys, values

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value, *rest = args
        names = ("attn_mask", "dropout_p", "is_causal")
        kwargs = {**dict(zip(names, rest, strict=False)), **kwargs}
        key, value = (
            torch.cat([beside(rows, own), own], dim=2) for rows, own in zip(self.prefix, (key, value), strict=True)
        )
        if kwargs.get("attn_mask") is not None:
            kwargs["attn_mask"] = open_mask(kwargs["attn_mask"], self.prefix[0].shape[1])
        return function(query, key, value, **kwargs)


def is_swin(encoder: nn.Module) -> bool:
    """Whether blocks are divided into stages that grow wider."""
    return hasattr(encoder, "layers") and not hasattr(encoder, "blocks")


def _inside(model: nn.Module) -> nn.Module:
    """timm's own model, with an adapter around it or without."""
    encoder = getattr(model, ENCODER)
    return getattr(encoder, "base_layer", encoder)


def _width(layer: nn.Module) -> int:
    return layer.norm1.normalized_shape[0]


def _exchange(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` where `old` is inside `root`."""
    for parent in root.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
                return
    raise ValueError(f"timm's {type(root).__name__} has no classifier of its own that an adapter could replace.")


FAMILIES = (
    TimmFamily(
        "timm_wrapper",
        ("TimmWrapperForImageClassification",),
        encoder=ENCODER,
        head=HEAD,
        interpolates=False,
        reads="mean",
    ),
)
