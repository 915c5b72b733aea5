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


@dataclass
class Prompts:
    """The prompts of one batch, and what choosing them costs.

    Attributes:
        layers: layer number -> what enters it.
        losses: the pool's own loss terms, already weighted, to be added to the cross-entropy; empty outside training.
        selected: chosen rows, (B, N) or (layers, B, N); None where all rows take part.
        parts: prompts whose features the pool wants to compare in training (`PromptPool.compare`), by name.
    """

    layers: Mapping[int, Injection] = field(default_factory=dict)
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    selected: torch.Tensor | None = None
    parts: dict[str, Prompts] = field(default_factory=dict)

    def at(self, layer: int, hidden_states: torch.Tensor) -> Injection | None:
        """What enters `layer`, whose input is `hidden_states` (B, N, D). A pool may decide by that input."""
        return self.layers.get(layer)


def halves(rows: torch.Tensor) -> Injection:
    """Prefix from rows (B or 1, L, D) whose first half are keys and whose second half are values (CODA-Prompt)."""
    keys, values = rows.chunk(2, dim=1)
    return Injection(keys=keys, values=values)
