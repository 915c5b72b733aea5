"""What a pool hands to the encoder: for each layer, what enters it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Injection:
    """What enters one encoder layer.

    Attributes:
        keys, values: prefix rows of that layer's attention, (B or 1, L, D); both or neither.
        tokens: rows put in front of the sequence before the layer, (B or 1, L, D).
        cls_position: add the CLS token's position embedding to the tokens.
        keep: whether the tokens travel on through the later layers, or are taken out again after this one.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    cls_position: bool = False
    keep: bool = True

    @classmethod
    def from_halves(cls, prompts: torch.Tensor) -> Injection:
        """Prefix of prompts whose first half of rows are keys and whose second half are values.

        Args:
            prompts: (B or 1, L, D), or (B, N, L, D) for N prompts; these are cut first and then chained.
        """
        keys, values = (half.flatten(1, -2) for half in prompts.chunk(2, dim=-2))
        return cls(keys=keys, values=values)


@dataclass
class Prompts:
    """The prompts of one batch, and what choosing them costs.

    Attributes:
        layers: layer number -> what enters it.
        losses: the pool's own loss terms, already weighted, to be added to the cross-entropy; empty outside training.
        selected: chosen rows, (B, N) or (layers, B, N); None where all rows take part.
        parts: prompts whose features the pool wants to compare in training (`PromptPool.compare`), by name.
        weights: how much of each row an image gets, (layers, B, rows), without a graph; None where rows are chosen.
    """

    layers: Mapping[int, Injection] = field(default_factory=dict)
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    selected: torch.Tensor | None = None
    parts: dict[str, Prompts] = field(default_factory=dict)
    weights: torch.Tensor | None = None

    def at(self, layer: int, hidden_states: torch.Tensor) -> Injection | None:
        """What enters `layer`, whose input is `hidden_states` (B, N, D). A pool may decide by that input."""
        return self.layers.get(layer)
