"""What prompting needs to know of one family of vision transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention import prefixed
from .geometry import Geometry


@dataclass(frozen=True)
class Family:
    """Where one family of HF image classifiers keeps the parts that prompting touches, and how they are run.

    The defaults are ViT's. A family that differs in names alone is one row, `Family(...)`; one that differs in what it
    does is a subclass with the methods that differ. `register_family` makes it known; `examples/custom_backbone.py`
    shows one from its begin to its end.

    Attributes:
        model_type: `config.model_type` of the family.
        model_classes: names of the classification models supported; the first one is what `loader_of` loads.
        encoder: attribute of the classification model that holds the encoder.
        head: attribute of the classification model that holds the classifier.
        embeddings, layers, norm: the encoder's parts, by their paths in it.
        attention, norms, mlp: attributes of a layer: its attention, the norms before attention and before MLP, and the
            MLP.
        branches: attributes of a layer through which the results of attention and of the MLP go, in this order, before
            they are added to the layer's input.
        projections: attributes of the attention: queries, keys, values, output.
        special_tokens: tokens in front of the patches (CLS, distillation token ...); the first one is the CLS token.
            0: there is none, and the mean of the patches stands for it.
        arguments: what each layer takes beside the tokens, where it is always the same.
        interpolates: whether the embeddings take `interpolate_pos_encoding`; False: images of any size are right as
            they are.
        unsaid: what the classification model hands on as `interpolate_pos_encoding` where its user said nothing.
        reads: what the model's own classifier reads of the encoder's tokens: `"cls"`, `"mean"` (of the patches) or
            `"cls+mean"`.
    """

    model_type: str
    model_classes: tuple[str, ...]
    encoder: str
    head: str = "classifier"
    embeddings: str = "embeddings"
    layers: str = "layers"
    norm: str = "layernorm"
    attention: str = "attention"
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    mlp: str = "mlp"
    branches: tuple[tuple[str, ...], tuple[str, ...]] = (("dropout",), ("dropout",))
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    special_tokens: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    interpolates: bool = True
    unsaid: bool | None = None
    reads: str = "cls"

    # ----------------------------------------------------------------------------------------------- facts

    def geometry(self, encoder: nn.Module) -> Geometry:
        """Sizes of `encoder`."""
        size = self.hidden_size(encoder)
        return Geometry(
            hidden_size=size,
            num_layers=len(self.layer_list(encoder)),
            own_width=size * len(self.reads.split("+")),
            has_cls=self.has_cls(encoder),
            has_cls_token=self.num_special(encoder) > 0,
            special_tokens=self.num_special(encoder),
            reads_cls=self.reads == "cls",
            why_no_tokens=self.why_no_tokens(encoder),
        )

    def hidden_size(self, encoder: nn.Module) -> int:
        """D of the features after the last layer."""
        return encoder.config.hidden_size

    def has_cls(self, encoder: nn.Module) -> bool:
        """Whether there is a CLS token, or something that the family pools in its place (`cls`)."""
        return self.special_tokens > 0

    def num_special(self, encoder: nn.Module) -> int:
        """Tokens in front of the patches."""
        return self.special_tokens

    def why_no_tokens(self, encoder: nn.Module) -> str | None:
        """Why prompts cannot enter as tokens, as a sentence; None: they can."""
        return None

    def why_not(self, model: nn.Module) -> str | None:
        """Why this model of the family cannot be prompted, as a sentence; None: it can."""
        return None

    def without_prompts(self, model: nn.Module) -> Family | None:
        """How the features of a model that `why_not` refuses are read all the same; None: as of any classifier."""
        return None

    def image_config(self, model: nn.Module) -> Any:
        """What has `image_size`, `patch_size` and `num_channels`; an `image_size` of None: any."""
        return model.config

    #: What to do where images are of another size, if `interpolate_pos_encoding` does not help.
    remedy_for_size: ClassVar[str | None] = None

    # ----------------------------------------------------------------------------------------------- parts

    def places(self) -> list[str]:
        """The attributes of the classification model whose modules an adapter replaces, as PEFT's `target_modules`."""
        return [self.encoder, self.head]

    def head_of(self, model: nn.Module) -> nn.Module:
        """The classifier, or what stands in its place."""
        return getattr(model, self.head)

    def put_head(self, model: nn.Module, head: nn.Module) -> None:
        """Put a module in the classifier's place."""
        setattr(model, self.head, head)

    def give_head_back(self, model: nn.Module, classifier: nn.Module) -> None:
        """Undo `put_head`."""
        setattr(model, self.head, classifier)

    def answer(self, output: Any, classify: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """What the classification model expects of its encoder: the encoder's output. Where the encoder is a whole
        classifier, the answer of the head, `classify`, to what it has pooled."""
        return output

    def layer_list(self, encoder: nn.Module) -> nn.ModuleList | list[nn.Module]:
        return encoder.get_submodule(self.layers)

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return getattr(layer, self.attention)

    def below_layers(self, encoder: nn.Module) -> list[nn.Module]:
        """What is run before the first layer."""
        return [encoder.get_submodule(self.embeddings)]

    def draws_positions(self, encoder: nn.Module) -> bool:
        """Whether positions are drawn anew in each training pass."""
        return False

    def feature_norm(self, encoder: nn.Module) -> nn.Module:
        """What makes tokens of a layer's output features."""
        return encoder.get_submodule(self.norm)

    def cls_position(self, encoder: nn.Module) -> torch.Tensor:
        """The CLS token's position embedding, (D,); zero where it has none."""
        positions = getattr(encoder.get_submodule(self.embeddings), "position_embeddings", None)
        if positions is None or not self.special_tokens:
            return next(encoder.parameters()).new_zeros(())
        return positions[0, 0]

    def checkpointing(self, encoder: nn.Module, layer: nn.Module) -> nn.Module:
        """The module whose `gradient_checkpointing` says whether the layer is checkpointed."""
        return layer

    # ----------------------------------------------------------------------------------------------- the passes

    def embed(
        self, encoder: nn.Module, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Token embeddings with positions, (B, special tokens + patches, D), in the encoder's dtype, and what the
        first layer takes beside them."""
        embeddings = encoder.get_submodule(self.embeddings)
        # The frozen model may be bfloat16 while the images are float32, as in the encoder's own forward.
        pixel_values = pixel_values.to(next(embeddings.parameters()).dtype)
        options = {"interpolate_pos_encoding": interpolate_pos_encoding} if self.interpolates else {}
        return embeddings(pixel_values, **options), self.arguments

    def run(self, layer: nn.Module, hidden: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """One layer's output."""
        output = layer(hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def prefixed(self, layer: nn.Module, hidden: torch.Tensor, *prefix: torch.Tensor) -> AbstractContextManager[None]:
        """Let the layer's attention see prefix keys and values, (B or 1, L, D), inside the block."""
        return prefixed(self.attention_of(layer), hidden, *prefix)

    def after(
        self, encoder: nn.Module, index: int, hidden: torch.Tensor, arguments: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """What lies between layer `index` and the next one."""
        return hidden, arguments

    # ----------------------------------------------------------------------------------------------- what is read

    def cls(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """(B, D): the CLS feature of a layer's output (B, special tokens + patches, D), by which prompts are chosen;
        the mean of the patches where there is none."""
        return self.feature_norm(encoder)(hidden[:, 0]) if self.num_special(encoder) else self.mean(encoder, hidden)

    @property
    def cls_is_first_token(self) -> bool:
        """Whether `cls` reads the first token alone, so that no other has to be computed."""
        return type(self).cls is Family.cls and self.special_tokens > 0

    def mean(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """(B, D): the mean of the patches of a layer's output."""
        return self.feature_norm(encoder)(hidden[:, self.num_special(encoder) :]).mean(1)

    def last_hidden_state(self, encoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The encoder's own `last_hidden_state`, of the last layer's output."""
        return encoder.get_submodule(self.norm)(hidden)

    def pooled(self, encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """What the model's own classifier is given, of the encoder's `last_hidden_state`."""
        found = self.pooler_output(encoder, tokens)
        if found is not None:
            return found
        patches = tokens[:, self.num_special(encoder) :]
        parts = [tokens[:, 0] if part == "cls" else patches.mean(1) for part in self.reads.split("+")]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def pooler_output(self, encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor | None:
        """The encoder's own `pooler_output`, if the classification model reads it."""
        return None

    def output(
        self,
        tokens: torch.Tensor,
        pooler_output: torch.Tensor | None,
        hidden_states: tuple[torch.Tensor, ...] | None = None,
        attentions: tuple[torch.Tensor, ...] | None = None,
    ) -> Any:
        """What the encoder's own forward returns."""
        return BaseModelOutputWithPooling(tokens, pooler_output, hidden_states, attentions)
