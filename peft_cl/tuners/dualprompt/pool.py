"""DualPrompt's pool: a general prompt, and one expert row a task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..base.initialisation import draw_rows
from ..base.pool import Geometry, PromptPool
from ..base.prompts import Injection, Prompts
from ..base.similarity import batch_vote, cosine, pull_term
from .config import DualPromptConfig


class DualPromptPool(PromptPool):
    """Parameters: `g_prompts` (g of the paper), (G layers, 2, L_g, D); `prompts` (e_t), (E layers, 2, rows, L_e, D);
    `keys` (k_t), (key sets, rows, D). On the axis of 2 stand keys and values; as tokens it is an axis of 1. `prompts`
    and `keys` hold the current task's row, `past_prompts` and `past_keys` those before. For a stream they hold all
    `pool_size` rows, from which each image takes the one with the nearest key, in training too. Without expert layers
    there is `g_prompts` alone.
    """

    config: DualPromptConfig
    row_axes = {"prompts": -3, "keys": -2}

    def __init__(self, config: DualPromptConfig, geometry: Geometry):
        super().__init__(config, geometry)
        size, layers = geometry.hidden_size, len(config.layers)
        sets = layers if config.keys_per_layer else 1
        parts = 2 if config.prompt_type == "prefix" else 1
        wide = geometry.size_at(config.prompted_layers)  # a layer may take both prompts
        general = (len(config.g_layers), parts, config.g_prompt_length, wide)
        self.g_prompts = nn.Parameter(draw_rows(config.init, *general))
        if not config.layers:  # the general prompt alone: nothing is chosen
            self.row_axes = {}
            return
        rows = config.pool_size if config.stream else 1
        self.prompts = nn.Parameter(draw_rows(config.init, layers, parts, rows, config.prompt_length, wide))
        self.keys = nn.Parameter(draw_rows(config.init, sets, rows, size))
        self.register_buffer("past_prompts", torch.zeros(layers, parts, self.task, config.prompt_length, wide))
        self.register_buffer("past_keys", torch.zeros(sets, self.task, size))

    @property
    def first_layer(self) -> int:
        return min([*self.config.layers, *self.config.g_layers])

    @property
    def rows_in_use(self) -> int:
        return self.past_keys.shape[-2] + self.keys.shape[-2] if self.row_axes else 0

    def begin_task(self, index: int) -> None:
        if not self.row_axes:
            return
        shared = self.config.shared_prompt_pool
        copied = self.prompts.detach().clone() if shared else draw_rows(self.config.init, *self.prompts.shape)
        self._grow("prompts", copied)
        self._grow("keys", draw_rows(self.config.init, *self.keys.shape))

    def begin_stream(self) -> None:
        for name, axis in self.row_axes.items():
            current = getattr(self, name)
            shape = list(current.shape)
            shape[axis] = self.config.pool_size
            rows = draw_rows(self.config.init, *shape).to(current)
            setattr(self, name, nn.Parameter(rows, requires_grad=current.requires_grad))

    def select(self, query: torch.Tensor) -> Prompts:
        config, losses = self.config, {}
        general = {layer: self.g_prompts[place][:, None] for place, layer in enumerate(config.g_layers)}
        if not self.row_axes:
            return Prompts(self._inject(general, {}))
        if self.training:
            similarity = cosine(query, self.keys)  # (sets, B, rows); of a task there is one row, which all take
            chosen = similarity.argmax(-1, keepdim=True)
            pull = pull_term(
                query, self.keys, similarity, chosen, form=config.pull_form, reduction=config.pull_reduction
            )
            losses["pull"] = config.pull_coefficient * pull
            selected = chosen + self.past_keys.shape[-2]
            experts = {layer: self._experts(place, chosen) for place, layer in enumerate(config.layers)}
        else:
            selected = cosine(query, self.rows("keys")).argmax(-1, keepdim=True)  # (sets, B, 1)
            if config.batchwise_prompt_at_test:
                selected = batch_vote(selected, self.rows_in_use)
            experts = {
                layer: self._chosen(place, selected[place if config.keys_per_layer else 0, :, 0])
                for place, layer in enumerate(config.layers)
            }
        parts = {}
        if self.training and config.separation_coefficient:
            parts = {"general": Prompts(self._inject(general, {})), "expert": Prompts(self._inject({}, experts))}
        return Prompts(self._inject(general, experts), losses, selected.squeeze(0), parts)

    def _experts(self, place: int, chosen: torch.Tensor) -> torch.Tensor:
        """The trained rows (2 or 1, B or 1, L, D) that a layer takes; one row serves the whole batch."""
        prompts = self.prompts[place]
        if prompts.shape[1] == 1:
            return prompts
        rows = chosen[place if self.config.keys_per_layer else 0, :, 0]
        # As an embedding, whose gradient is summed in the same order in every run.
        picked = F.embedding(rows, prompts.transpose(0, 1).flatten(1))
        return picked.unflatten(-1, (len(prompts), *prompts.shape[2:])).transpose(0, 1)

    def _chosen(self, place: int, rows: torch.Tensor) -> torch.Tensor:
        """Past and current rows (2 or 1, B, L, D) of a layer, without a copy of all of them."""
        past, current = self.past_prompts[place], self.prompts[place]
        count = past.shape[1]
        now = current[:, (rows - count).clamp_min(0)]
        if not count:
            return now
        return torch.where((rows < count)[:, None, None], past[:, rows.clamp_max(count - 1)].to(now), now)

    def _inject(
        self, general: Mapping[int, torch.Tensor], experts: Mapping[int, torch.Tensor]
    ) -> dict[int, Injection]:
        """Prompts (2 or 1, B or 1, L, D) of each layer; a layer with both takes [G; E]."""
        layers = {}
        for layer in {*general, *experts}:
            both = [prompts[layer] for prompts in (general, experts) if layer in prompts]
            batch = max(prompt.shape[1] for prompt in both)
            rows = torch.cat([prompt.expand(-1, batch, -1, -1) for prompt in both], dim=2)
            if self.config.prompt_type == "tokens":
                layers[layer] = Injection(tokens=rows[0])
            else:
                layers[layer] = Injection(keys=rows[0], values=rows[1])
        return layers

    def compare(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Squared Frobenius norm of the batch covariance of the two parts' features: what they share is penalised."""
        general, expert = (features[name] - features[name].mean(0) for name in ("general", "expert"))
        covariance = general.T @ expert / max(len(general) - 1, 1)
        return {"separation": self.config.separation_coefficient * covariance.square().sum()}
