"""CODA-Prompt's pool: components, keys and attention vectors for each layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..base.initialisation import RowSpan
from ..base.pool import Geometry, PromptPool
from ..base.prompts import Injection, Prompts
from ..base.similarity import gram_sum, pair_sum, selection_entropy_term
from .config import CodaPromptConfig


class CodaPromptPool(PromptPool):
    """Parameters of the current task's rows: `prompts` (P), (layers, rows, L, D); `keys` (K) and `attention` (A), both
    (layers, rows, D). `past_prompts`, `past_keys`, `past_attention` hold the rows of earlier tasks, which take part
    without a gradient.
    """

    config: CodaPromptConfig
    row_axes = {"prompts": -3, "keys": -2, "attention": -2}

    def __init__(self, config: CodaPromptConfig, geometry: Geometry):
        super().__init__(config, geometry)
        layers, size, length = len(config.layers), geometry.hidden_size, config.prompt_length
        past = self.task * config.components_per_task
        self.register_buffer("past_prompts", torch.zeros(layers, past, length, geometry.size_at(config.layers)))
        self.register_buffer("past_keys", torch.zeros(layers, past, size))
        self.trained = ["prompts", "keys"]
        self.spans: dict[str, list[RowSpan]] = {}
        if config.attention:
            self.register_buffer("past_attention", torch.zeros(layers, past, size))
            self.trained.append("attention")
        for name in self.trained:
            setattr(self, name, nn.Parameter(self._new_rows(name)))
        self.spans.clear()
        #: Of each name, the sum over pairs of past rows in the orthogonality term: it is constant within a task.
        self.past_sums: dict[str, float] = {}

    @property
    def needs_query(self) -> bool:
        return self.config.query_source == "pretrained"

    @property
    def first_layer(self) -> int:
        return min(self.config.layers)

    @property
    def rows_in_use(self) -> int:
        return self.past_keys.shape[-2] + self.keys.shape[-2]

    def begin_task(self, index: int) -> None:
        """Rows [s, f): Gram-Schmidt against all earlier rows, then unit norm, for P, K and A of each layer."""
        earlier = self.rows_in_use
        for name in self._penalised:
            if name in self.past_sums:
                self.past_sums[name] += self._pairs_with(name, getattr(self, name), self._flat_past(name)).item()
        for name in self.trained:
            for place, span in enumerate(self._spans(name)):
                span.follow(earlier, partial(self._some_rows, name, place))
            self._grow(name, self._new_rows(name))

    def _new_rows(self, name: str) -> torch.Tensor:
        """(layers, new rows, ...), orthogonal to the earlier ones; a row is orthogonal as a whole, flattened."""
        rows = torch.stack([span.new_rows() for span in self._spans(name)])
        return rows.unflatten(-1, getattr(self, f"past_{name}").shape[2:])

    def _spans(self, name: str) -> list[RowSpan]:
        shape, count = getattr(self, f"past_{name}").shape, self.config.components_per_task
        return self.spans.setdefault(name, [RowSpan(shape[2:].numel(), count) for _ in range(shape[0])])

    def _some_rows(self, name: str, place: int, first: int, last: int) -> torch.Tensor:
        """Rows of a layer from `first` to before `last`, of past and current ones."""
        past, current = getattr(self, f"past_{name}")[place], getattr(self, name)[place].detach()
        parts = past[first:last], current[max(0, first - len(past)) : max(0, last - len(past))]
        return torch.cat([part.flatten(1) for part in parts])

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.spans.clear()  # they were of other rows
        self.past_sums.clear()

    def forward(self, query: torch.Tensor | None) -> Prompts:
        if not self.needs_query:
            return LayerwisePrompts(self)
        return super().forward(query)

    def select(self, query: torch.Tensor) -> Prompts:
        similarity, prompts = self.weigh(query)
        layers = {layer: self.injection(prompts[place]) for place, layer in enumerate(self.config.layers)}
        losses = self.losses(similarity) if self.training else {}
        return Prompts(layers, losses, self.selected(similarity))

    def weigh(self, query: torch.Tensor, place: int | slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (..., B, rows) and prompts (..., B, L, D) of the layers at `place`.

        Past and current rows go their own ways: neither is copied, and only the current ones send gradients back.
        """
        parts = [
            [getattr(self, prefix + name)[place] if name in self.trained else None for name in self.row_axes]
            for prefix in (("past_", "") if self.past_keys.numel() else ("",))
        ]
        weights = [self.similarity(query, keys, attention) for _, keys, attention in parts]
        similarity = torch.cat(weights, dim=-1)
        if self.config.selection == "top1":
            chosen = F.one_hot(similarity.argmax(-1), similarity.shape[-1]).to(similarity.dtype)
            weights = chosen.split([part.shape[-1] for part in weights], dim=-1)
        prompts = sum(
            weight @ components.to(weight).flatten(-2) for weight, (components, *_) in zip(weights, parts, strict=True)
        )
        return similarity, prompts.unflatten(-1, self.prompts.shape[-2:])

    def similarity(self, query: torch.Tensor, keys: torch.Tensor, attention: torch.Tensor | None) -> torch.Tensor:
        """Cosine of q * A with K (eq. 5-6): query (B, D), keys and attention (..., k, D) -> (..., B, k).

        The products q * A, (B, k, D), are never formed: with unit keys K, the cosine is q (A * K)' / sqrt(q^2 (A^2)').
        """
        keys = F.normalize(keys, dim=-1)
        if attention is None:
            return F.normalize(query, dim=-1) @ keys.transpose(-1, -2)
        products = query @ (attention * keys).transpose(-1, -2)
        squares = query.square() @ attention.square().transpose(-1, -2)
        return products * squares.clamp_min(1e-24).rsqrt()

    def selected(self, similarity: torch.Tensor) -> torch.Tensor | None:
        return similarity.argmax(-1, keepdim=True) if self.config.selection == "top1" else None

    def injection(self, prompts: torch.Tensor) -> Injection:
        """(B, L, D) -> what enters the layer."""
        if self.config.prompt_type == "prefix":
            return Injection.from_halves(prompts)
        return Injection(tokens=prompts, keep=False)

    def losses(self, similarity: torch.Tensor) -> dict[str, torch.Tensor]:
        losses = {}
        if self._penalised:
            # Gram: mean((R R' - I)^2), summed over layers (eq. 8, as its code has it); else the sum over ordered
            # pairs, averaged over layers (the textbook form).
            count = self.rows_in_use**2 if self.config.orthogonality == "gram" else len(self.config.layers)
            penalty = sum(self._sum_over_pairs(name) for name in self._penalised) / count
            losses["orthogonality"] = self.config.orthogonality_coefficient * penalty
        if self.config.entropy_coefficient:
            losses["entropy"] = self.config.entropy_coefficient * selection_entropy_term(similarity)
        return losses

    @property
    def _penalised(self) -> list[str]:
        """Names of the parameters that the orthogonality term is of."""
        if not self.config.orthogonality_coefficient:
            return []
        return self.trained if self.config.orthogonality == "gram" else ["prompts"]

    def _flat_past(self, name: str) -> torch.Tensor:
        return getattr(self, f"past_{name}").flatten(2)

    def _pairs_with(self, name: str, rows: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        pairs = gram_sum if self.config.orthogonality == "gram" else pair_sum
        return pairs(rows.flatten(2), past.to(rows))

    def _sum_over_pairs(self, name: str) -> torch.Tensor:
        """Over all pairs of past and current rows; only the current ones get a gradient."""
        past = self._flat_past(name)
        if name not in self.past_sums:
            size = self.config.components_per_task
            parts = [(past[:, first : first + size], past[:, :first]) for first in range(0, past.shape[1], size)]
            self.past_sums[name] = sum(self._pairs_with(name, *part).item() for part in parts)
        return self._pairs_with(name, getattr(self, name), past) + self.past_sums[name]


class LayerwisePrompts(Prompts):
    """Prompts that are chosen at each layer by the layer's own input, while the prompted pass runs."""

    def __init__(self, pool: CodaPromptPool):
        super().__init__()
        self.pool = pool
        self.places = {layer: place for place, layer in enumerate(pool.config.layers)}
        self.similarities: list[torch.Tensor] = []

    def at(self, layer: int, hidden_states: torch.Tensor) -> Injection | None:
        place = self.places.get(layer)
        if place is None:
            return None
        pool = self.pool
        own = hidden_states[:, 0] if pool.config.query_source == "layer_cls" else hidden_states.mean(dim=1)
        with torch.autocast(hidden_states.device.type, enabled=False):
            similarity, prompts = pool.weigh(own.to(pool.keys.dtype), place)
        self.similarities.append(similarity)
        if len(self.similarities) == len(self.places):
            similarity = torch.stack(self.similarities)
            self.selected = pool.selected(similarity)
            if pool.training:
                self.losses.update(pool.losses(similarity))
        return pool.injection(prompts)
