"""Two heads as one: what the prompted model says, and what the frozen model's features say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .checks import check_choice, check_number
from .composite import CompositeHead
from .head import HEADS, Sizes, make_head, register_head
from .linear import Init


@register_head("fusion")
class FusionHead(CompositeHead):
    """logits = log softmax(prompted(f)) + `weight` x query_head(q),  for the prompted feature f and the frozen one q.

    The frozen feature costs nothing, as prompts are chosen by it; and as it never changes, sums over it stay exact
    while prompts go on learning. The query's head should give log-likelihoods, as `"lda"` does.

    Args:
        prompted: name of the head on prompted features, trained or one that observes.
        query: name of the head on frozen features, which must be one that observes.
        weight: of the frozen features' word.
        prompted_options, query_options: the two heads' own options.
    """

    title = "fusion"
    observes = True
    needs_query = True
    part_names = ("query", "prompted")

    def __init__(
        self,
        sizes: Sizes,
        classes: int,
        init: Init = "default",
        *,
        prompted: str = "linear",
        query: str = "lda",
        weight: float = 1.0,
        prompted_options: Mapping | None = None,
        query_options: Mapping | None = None,
    ):
        super().__init__(sizes, classes)
        self.weight = check_number("weight", weight, least=0)
        known = [name for name, head in HEADS.items() if name not in ("fusion", "aligned") and head.observes]
        check_choice("query", query, tuple(known))
        check_choice("prompted", prompted, tuple(name for name in HEADS if name != "fusion"))
        self.prompted = make_head(prompted, sizes, classes, prompted_options or {}, init)
        self.query = make_head(query, Sizes(sizes.query, sizes.query), classes, query_options or {})
        self.title = f"{self.prompted.title} and {self.query.title} of the query"
        self.guides_prompts, self.needs_features = self.prompted.guides_prompts, self.prompted.needs_features

    @property
    def needs_training(self) -> bool:
        return self.prompted.needs_training or self.query.needs_training

    @classmethod
    def settle(cls, options: Mapping[str, Any], base: nn.Module) -> Mapping[str, Any]:
        parts = {}
        for part in ("prompted", "query"):
            name = options.get(part) or ("linear" if part == "prompted" else "lda")
            settled = HEADS[name].settle(options.get(f"{part}_options") or {}, base)
            if settled:
                parts[f"{part}_options"] = dict(settled)
        return {**options, **parts}

    def expect_few(self, options):
        own = ((f"{name}_options", part) for name, part in self.parts.items())
        return {**options, **{name: dict(part.expect_few(options.get(name) or {})) for name, part in own}}

    def forward(self, features, query=None):
        logits = self.prompted(features)
        if self.training:
            return logits
        if query is None:
            raise ValueError(
                "The head 'fusion' needs the frozen model's features beside the prompted ones. Give both: "
                "forward(features, query)."
            )
        with torch.autocast(features.device.type, enabled=False):
            return logits.float().log_softmax(-1) + self.weight * self.foretell(query)

    def foretell(self, query):
        return self.query(query.to(self.query.dtype))

    def observe(self, features, labels, query=None):
        self.prompted.observe(features, labels)
        self.query.observe(query, labels)

    def move(self, old, new, how):
        self.prompted.move(old, new, how)  # the query's features stay
