"""CODA-Prompt's pool: components, keys and attention vectors for each layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backbones.modes import without_autocast
from ..base.pool import Geometry
from ..base.prompts import Injection, Prompts
from ..base.row_pool import RowPool
from .config import CodaPromptConfig


PARTS = ("prompts", "keys", "attention")


class CodaPromptPool(RowPool):
    """Parameters of the current task's rows: `prompts` (P), (layers, rows, L, D); `keys` (K) and `attention` (A), both
    (layers, rows, D). `past_prompts`, `past_keys`, `past_attention` hold the rows of earlier tasks, which take part
    without a gradient. With `components_per_task=None` all tasks share the rows.
    """

    config: CodaPromptConfig
    row_axes = {"prompts": -3, "keys": -2, "attention": -2}

    def __init__(self, config: CodaPromptConfig, geometry: Geometry):
        super().__init__(config, geometry)
        layers, size, past = len(config.layers), config.key_width(geometry), config.past_count
        count = config.current_count if config.shares_rows else config.components_per_task
        shapes = {
            "prompts": (layers, count, config.prompt_length, geometry.size_at(config.layers)),
            "keys": (layers, count, size),
        }
        if config.attention:
            shapes["attention"] = (layers, count, size)
        self.row_axes = {name: axis for name, axis in self.row_axes.items() if name in shapes}
        self._make_rows(shapes, past if config.shares_rows else self.task * count)

    @property
    def needs_query(self) -> bool:
        return self.config.query_source == "pretrained"

    @property
    def first_layer(self) -> int:
        return min(self.config.layers)

    def begin_task(self, index: int) -> None:
        """Rows [s, f): with `init="orthogonal"` Gram-Schmidt against all earlier rows, then unit norm, for P, K and A
        of each layer."""
        super().begin_task(index)
        if not self.config.shares_rows:
            self.add_rows(self.config.components_per_task)

    def forward(self, query: torch.Tensor | None) -> Prompts:
        if not self.needs_query:
            return LayerwisePrompts(self)
        return super().forward(query)

    def select(self, query: torch.Tensor) -> Prompts:
        similarity, prompts = self.weigh(query)
        layers = {layer: self.injection(prompts[place]) for place, layer in enumerate(self.config.layers)}
        losses = self.terms(similarity) if self.training else {}
        return Prompts(layers, losses, self.selected(similarity), weights=self.weights(similarity))

    def weigh(self, query: torch.Tensor, place: int | slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (..., B, rows) and prompts (..., B, L, D) of the layers at `place`.

        Past and current rows go their own ways: neither is copied, and only the current ones send gradients back.
        """
        parts = [
            [getattr(self, prefix + name)[place] if name in self.row_axes else None for name in PARTS]
            for prefix in (("past_", "") if self.past("keys").numel() else ("",))
        ]
        weights = [self.similarity(query, keys, attention) for _, keys, attention in parts]
        similarity = torch.cat(weights, dim=-1)
        out_of_part = self.out_of_part(similarity) if similarity.ndim == 3 else None
        if out_of_part is not None:
            nothing = torch.finfo(similarity.dtype).min if self.config.selection == "top1" else 0.0
            similarity = similarity.masked_fill(out_of_part, nothing)
            weights = similarity.split([part.shape[-1] for part in weights], dim=-1)
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
        if self.config.similarity == "dot":
            return query @ (keys if attention is None else attention * keys).transpose(-1, -2)
        keys = F.normalize(keys, dim=-1)
        if attention is None:
            return F.normalize(query, dim=-1) @ keys.transpose(-1, -2)
        products = query @ (attention * keys).transpose(-1, -2)
        squares = query.square() @ attention.square().transpose(-1, -2)
        return products * squares.clamp_min(1e-24).rsqrt()

    def selected(self, similarity: torch.Tensor) -> torch.Tensor | None:
        return similarity.argmax(-1, keepdim=True) if self.config.selection == "top1" else None

    def weights(self, similarity: torch.Tensor) -> torch.Tensor | None:
        return None if self.config.selection == "top1" else similarity.detach()

    def injection(self, prompts: torch.Tensor) -> Injection:
        """(B, L, D) -> what enters the layer."""
        if self.config.prompt_type == "prefix":
            return Injection.from_halves(prompts)
        return Injection(tokens=prompts, keep=False)


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
        source = pool.config.query_source
        first = pool.geometry.special_tokens if source == "layer_patches" else 0
        own = hidden_states[:, 0] if source == "layer_cls" else hidden_states[:, first:].mean(dim=1)
        with without_autocast(hidden_states.device):
            similarity, prompts = pool.weigh(own.to(pool.keys.dtype), place)
        self.similarities.append(similarity)
        if len(self.similarities) == len(self.places):
            similarity = torch.stack(self.similarities)
            self.selected, self.weights = pool.selected(similarity), pool.weights(similarity)
            if pool.training:
                self.losses.update(pool.terms(similarity))
        return pool.injection(prompts)
