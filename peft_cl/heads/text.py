"""A head of class names: zero-shot classification by CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_count
from .head import Head, Sizes, register_head
from .text_tower import PLACEHOLDER, TextTower, embedding_size, text_config


@register_head("text")
class TextHead(Head):
    """logit_c = s cos(W f, t_c) + b, for the CLS feature f, the checkpoint's own projection W, scale s and bias b, and
    the embedding t_c of the class's name (CLIP, Radford et al. 2021, sec. 3.1; SigLIP, Zhai et al. 2023).

    A class is known by its name, before any of its images is seen. Predicting needs no text tower: the embeddings are
    saved with the adapter. Prompts, where there are any, are learnt under these logits.

    Args:
        checkpoint: whose text tower embeds the names. None: the one that the base model was loaded from.
        templates: texts with `{}` in the place of the name; a class has the mean of its texts' embeddings.
        context: vectors that are learnt in front of the name (CoOp, Zhou et al. 2022, eq. 2-3, one context for all
            classes) in the place of the templates' words. 0: the templates.
        sizes_of_towers: written when the adapter is made: numbers of an embedding, an image's feature and a token.
    """

    title = "class names"
    guides_prompts = True
    needs_features = "cls"
    needs_training = False

    def __init__(
        self,
        sizes: Sizes,
        classes: int,
        *,
        checkpoint: str | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        context: int = 0,
        sizes_of_towers: Sequence[int] | None = None,
    ):
        super().__init__(sizes, classes)
        are_texts = isinstance(templates, (list, tuple)) and all("{}" in str(each) for each in templates)
        if not are_texts or not templates:
            raise ValueError(
                f"templates is {templates!r}, but must be a list of texts with {{}} in the place of the class's name, "
                "such as ['a photo of a {}.']."
            )
        if context != 0:
            check_count("context", context)
        self.checkpoint, self.templates = checkpoint, list(templates)
        embedding, self.feature_size, token = sizes_of_towers or (sizes.features, sizes.features, sizes.features)
        self.register_buffer("embeddings", torch.zeros(classes, embedding))
        self.register_buffer("projection", torch.eye(embedding, self.feature_size))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))
        self.context = nn.Parameter(0.02 * torch.randn(context, token)) if context else None
        self.names: list[str] = []
        #: What the text tower is loaded from when it is wanted.
        self.source = checkpoint or ""
        #: Whether the context has been learnt on since the embeddings were taken.
        self._is_behind = False

    @classmethod
    def settle(cls, options: Mapping[str, Any], base: nn.Module) -> dict[str, Any]:
        if base.config.model_type not in ("clip", "siglip"):
            raise ValueError(
                f"head is 'text', but a {type(base).__name__} was not trained with texts. Take a CLIP or SigLIP base "
                "model, or another head."
            )
        if options.get("sizes_of_towers"):
            return dict(options)
        text = text_config(options.get("checkpoint") or base.config._name_or_path)
        found = [embedding_size(text), base.config.vision_config.hidden_size, text.text_config.hidden_size]
        return {**options, "sizes_of_towers": found}

    def describe(self, names: Sequence[str], base: nn.Module, *, known: bool = False) -> None:
        heard = len(self.names)
        self.names, self.source = list(names), self.checkpoint or base.config._name_or_path
        if known or len(names) == heard:
            return
        tower = TextTower.load(self.source)
        model, device = tower.model, self.embeddings.device
        with torch.no_grad():
            projection = getattr(model, "visual_projection", None)
            if projection is not None:  # SigLIP pools into the embedding itself
                self.projection.copy_(projection.weight)
            self.scale.copy_(model.logit_scale.exp().squeeze())
            self.bias.copy_(getattr(model, "logit_bias", torch.zeros(())).squeeze())
            if self.context is None:
                texts = ([each.format(name) for each in self.templates] for name in names[heard:])
                rows = F.normalize(torch.stack([tower.embed(each).mean(0) for each in texts]), dim=-1)
                self.embeddings = torch.cat([self.embeddings[:heard], rows.to(device)])
        self._follow_context()

    def forward(self, features, query=None):
        embeddings = self.embeddings
        if self.training and self.context is not None:
            embeddings, self._is_behind = self._embedded(), True
        image = F.linear(features[:, : self.feature_size], self.projection)
        return self.scale * F.normalize(image, dim=-1) @ embeddings.T + self.bias

    def train(self, mode: bool = True):
        if not mode and self._is_behind:
            self._follow_context()
        return super().train(mode)

    def _embedded(self) -> torch.Tensor:
        """Embeddings of the names under the learnt context, [v]_1 ... [v]_n [name]. (CoOp, eq. 2)"""
        begin = " ".join([PLACEHOLDER] * len(self.context))
        tower = TextTower.load(self.source)
        return tower.embed([f"{begin} {name}." for name in self.names], self.context).to(self.context)

    @torch.no_grad()
    def _follow_context(self) -> None:
        if self.context is not None:
            self.embeddings, self._is_behind = self._embedded(), False

    def grow(self, classes, *, keep):
        rows = self.embeddings.new_zeros(classes - keep, self.embeddings.shape[1])
        self.embeddings = torch.cat([self.embeddings[:keep], rows])
        self.classes = classes

    def keep_rows(self, rows):
        self.embeddings = self.embeddings[list(rows)].clone()
        self.names = [self.names[row] for row in rows] if self.names else []
        self.classes = len(rows)

    @torch.no_grad()
    def unite(self, heads, rows):
        """A name says the same in every adapter, unless a context was learnt for it."""
        if self.context is not None and any(not torch.equal(heads[0].context, head.context) for head in heads[1:]):
            raise ValueError(
                "The adapters have learnt different contexts of the class names (head_options: context), and one head "
                "has one. Join adapters with head_options={'context': 0}, or with the same context."
            )
        for name, own in self.named_parameters():
            own.copy_(getattr(heads[0], name))
        for name in ("projection", "scale", "bias"):
            getattr(self, name).copy_(getattr(heads[0], name))
        for head, places in zip(heads, rows, strict=True):
            self.embeddings[list(places)] = head.embeddings.to(self.embeddings)
