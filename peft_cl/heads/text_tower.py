"""The text tower of CLIP and SigLIP: names of classes to embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


#: Stands in a text for one learnt vector; a word that both tokenizers have as one token.
PLACEHOLDER = "x"


def text_config(checkpoint: str) -> PreTrainedConfig:
    """The configuration of a checkpoint with two towers.

    Raises:
        ValueError: it cannot be read, or has no text tower that is known here.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"head is 'text', whose class names are embedded by the text tower of {checkpoint!r}, but that cannot be "
            f"read ({str(error).splitlines()[0]}). Name a CLIP or SigLIP checkpoint by "
            "head_options={'checkpoint': ...}."
        ) from error
    if config.model_type not in ("clip", "siglip"):
        raise ValueError(
            f"head is 'text', but {checkpoint!r} is of model_type {config.model_type!r}, which has no text tower. "
            "Take a CLIP or SigLIP checkpoint."
        )
    return config


def embedding_size(config: PreTrainedConfig) -> int:
    """Numbers of a text's embedding, P."""
    return config.text_config.projection_size if config.model_type == "siglip" else config.projection_dim


class TextTower:
    """A frozen text tower with its tokenizer. It is no part of an adapter, and is not saved with one."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    @lru_cache(maxsize=1)
    def load(cls, checkpoint: str) -> TextTower:
        """From a checkpoint, once for all adapters of it."""
        text_config(checkpoint)
        try:
            return cls(
                AutoModel.from_pretrained(checkpoint, dtype="float32"), AutoTokenizer.from_pretrained(checkpoint)
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The text tower and the tokenizer of {checkpoint!r} cannot be loaded ({str(error).splitlines()[0]}). "
                "Classes are added by their names, which these embed: give a checkpoint that has both."
            ) from error

    def embed(self, texts: Sequence[str], context: torch.Tensor | None = None) -> torch.Tensor:
        """Unit embeddings (texts, P).

        Args:
            texts: with a `context` of n vectors, each begins with n placeholders.
            context: (n, width), in their places (CoOp, Zhou et al. 2022, eq. 3).
        """
        length = self.model.config.text_config.max_position_embeddings
        padding = "max_length" if self.model.config.model_type == "siglip" else True  # as it was trained
        tokens = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        words = self.model.text_model.get_input_embeddings()
        hook = nullcontext() if context is None else words.register_forward_hook(self._with(context, tokens))
        with hook:
            output = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens.get("attention_mask"))
        return F.normalize(output.pooler_output, dim=-1)

    def _with(self, context: torch.Tensor, tokens):
        placeholder = self.tokenizer(PLACEHOLDER, add_special_tokens=False)["input_ids"][0]

        def put(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            first = (tokens["input_ids"] == placeholder).int().argmax(-1)
            places = first[:, None] + torch.arange(len(context), device=output.device)
            return output.scatter(
                1,
                places[..., None].expand(-1, -1, output.shape[-1]),
                context.to(output).expand(len(output), -1, -1),
            )

        return put
