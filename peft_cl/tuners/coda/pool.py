"""CODA-Prompt's pool: components, keys and attention vectors for each layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..base.initialisation import orthonormal_rows
from ..base.pool import Geometry, PromptPool
from ..base.prompts import Injection, Prompts
from ..base.similarity import gram_penalty, pairwise_penalty, selection_entropy_term
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
        self.register_buffer("past_prompts", torch.zeros(layers, past, length, size))
        self.register_buffer("past_keys", torch.zeros(layers, past, size))
        self.trained = ["prompts", "keys"]
        if config.attention:
            self.register_buffer("past_attention", torch.zeros(layers, past, size))
            self.trained.append("attention")
        for name in self.trained:
            setattr(self, name, nn.Parameter(self._new_rows(getattr(self, f"past_{name}")[:, :0])))

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
        for name in self.trained:
            self._grow(name, self._new_rows(self.rows(name).detach()))

    def _new_rows(self, earlier: torch.Tensor) -> torch.Tensor:
        """(layers, earlier rows, ...) -> (layers, new rows, ...); a row is orthogonal as a whole, flattened."""
        shape = earlier.shape[2:]
        rows = [orthonormal_rows(self.config.components_per_task, layer.flatten(1).cpu()) for layer in earlier]
        return torch.stack(rows).unflatten(-1, shape)

    def forward(self, query: torch.Tensor | None) -> Prompts:
        if not self.needs_query:
            return LayerwisePrompts(self)
        return super().forward(query)

    def select(self, query: torch.Tensor) -> Prompts:
        attention = self.rows("attention") if self.config.attention else None
        similarity = self.similarity(query, self.rows("keys"), attention)
        prompts = self.combine(similarity, self.rows("prompts"))
        layers = {layer: self.injection(prompts[place]) for place, layer in enumerate(self.config.layers)}
        losses = self.losses(similarity) if self.training else {}
        return Prompts(layers, losses, self.selected(similarity))

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

    def combine(self, similarity: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Weights (..., B, k) and components (..., k, L, D) -> prompts (..., B, L, D) (eq. 3)."""
        if self.config.selection == "top1":
            similarity = F.one_hot(similarity.argmax(-1), similarity.shape[-1]).to(prompts.dtype)
        return (similarity @ prompts.flatten(-2)).unflatten(-1, prompts.shape[-2:])

    def selected(self, similarity: torch.Tensor) -> torch.Tensor | None:
        return similarity.argmax(-1, keepdim=True) if self.config.selection == "top1" else None

    def injection(self, prompts: torch.Tensor) -> Injection:
        """(B, L, D) -> what enters the layer."""
        if self.config.prompt_type == "prefix":
            return Injection.from_halves(prompts)
        return Injection(tokens=prompts, keep=False)

    def losses(self, similarity: torch.Tensor) -> dict[str, torch.Tensor]:
        losses = {}
        if self.config.orthogonality_coefficient:
            rows = {name: self.rows(name).flatten(2) for name in self.trained}
            if self.config.orthogonality == "gram":
                penalty = sum(gram_penalty(value) for value in rows.values())
            else:
                penalty = pairwise_penalty(rows["prompts"])
            losses["orthogonality"] = self.config.orthogonality_coefficient * penalty
        if self.config.entropy_coefficient:
            losses["entropy"] = self.config.entropy_coefficient * selection_entropy_term(similarity)
        return losses


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
            attention = pool.rows("attention")[place] if pool.config.attention else None
            similarity = pool.similarity(own.to(pool.keys.dtype), pool.rows("keys")[place], attention)
            prompts = pool.combine(similarity, pool.rows("prompts")[place])
        self.similarities.append(similarity)
        if len(self.similarities) == len(self.places):
            similarity = torch.stack(self.similarities)
            self.selected = pool.selected(similarity)
            if pool.training:
                self.losses.update(pool.losses(similarity))
        return pool.injection(prompts)
