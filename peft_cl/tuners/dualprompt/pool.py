"""DualPrompt's pool: a general prompt, and one expert row a task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..base.pool import Geometry
from ..base.prompts import Injection, Prompts
from ..base.row_pool import RowPool
from ..base.similarity import batch_vote, compare
from .config import DualPromptConfig


class DualPromptPool(RowPool):
    """Parameters: `g_prompts` (g of the paper), (G layers, 2, L_g, D); `prompts` (e_t), (E layers, 2, rows, L_e, D);
    `keys` (k_t), (key sets, rows, D). On the axis of 2 stand keys and values; as tokens it is an axis of 1. `prompts`
    and `keys` hold the current task's row, `past_prompts` and `past_keys` those before. For a stream, and with
    `expert_choice="key"`, they hold all rows, from which each image takes the one with the nearest key, in training
    too. Without expert layers there is `g_prompts` alone.
    """

    config: DualPromptConfig
    row_axes = {"prompts": -3, "keys": -2}

    def __init__(self, config: DualPromptConfig, geometry: Geometry):
        super().__init__(config, geometry)
        layers = len(config.layers)
        sets = layers if config.keys_per_layer else 1
        parts = 2 if config.prompt_type == "prefix" else 1
        wide = geometry.size_at(config.prompted_layers)  # a layer may take both prompts
        general = (len(config.g_layers), parts, config.g_prompt_length, wide)
        by_layer = config.init_layers == "hierarchical" and bool(config.g_layers)
        self.g_prompts = nn.Parameter(self.drawn(general, by_layer))
        if not layers:  # the general prompt alone: nothing is chosen
            self.row_axes = {}
            return
        past = config.past_count if config.shares_rows else self.task
        rows = config.current_count if config.shares_rows else config.pool_size if config.stream else 1
        self._make_rows(
            {
                "prompts": (layers, parts, rows, config.prompt_length, wide),
                "keys": (sets, rows, config.key_width(geometry)),
            },
            past,
        )

    def flat(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows.transpose(1, 2).flatten(2) if name == "prompts" else rows  # keys and values are one row

    def unflat(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        if name != "prompts":
            return rows
        parts, _, *shape = self.shapes[name][1:]
        return rows.unflatten(-1, (parts, *shape)).transpose(1, 2)

    @property
    def first_layer(self) -> int:
        return min([*self.config.layers, *self.config.g_layers])

    @property
    def rows_in_use(self) -> int:
        return super().rows_in_use if self.row_axes else 0

    def begin_task(self, index: int) -> None:
        super().begin_task(index)
        if self.config.train_g_prompts == "first_task":
            self.g_prompts.requires_grad_(False)
        if not self.row_axes or self.config.shares_rows:
            return
        self.add_rows(1, **({"prompts": self.prompts.detach().clone()} if self.config.shared_prompt_pool else {}))

    def begin_stream(self) -> None:
        for name in self.row_axes if not self.config.shares_rows else ():
            current = getattr(self, name)
            rows = self.new_rows(name, self.config.pool_size).to(current)
            setattr(self, name, nn.Parameter(rows, requires_grad=current.requires_grad))

    def select(self, query: torch.Tensor) -> Prompts:
        config, losses = self.config, {}
        general = {layer: self.g_prompts[place][:, None] for place, layer in enumerate(config.g_layers)}
        if not self.row_axes:
            return Prompts(self._inject(general, {}))
        if self.training:
            # Of a task there is one row, which all take: those of earlier tasks are not compared.
            keys = self.rows("keys") if config.shares_rows else self.keys
            similarity = compare(query, keys, config.similarity)  # (sets, B, rows)
            chosen = similarity.argmax(-1, keepdim=True)
            losses = self.terms_of_choice(query, keys, similarity, chosen)
            selected = chosen + self.rows_in_use - keys.shape[-2]
            experts = {
                layer: self._experts(place, chosen, keys.shape[-2]) for place, layer in enumerate(config.layers)
            }
        else:
            selected = self._choose(query)  # (sets, B, 1)
            experts = {
                layer: self._chosen(place, selected[place if config.keys_per_layer else 0, :, 0])
                for place, layer in enumerate(config.layers)
            }
        parts = {}
        if self.training and config.separation_coefficient:
            parts = {"general": Prompts(self._inject(general, {})), "expert": Prompts(self._inject({}, experts))}
        return Prompts(self._inject(general, experts), losses, selected.squeeze(0), parts)

    def _choose(self, query: torch.Tensor) -> torch.Tensor:
        """(sets, B, 1) rows, at test."""
        config, keys = self.config, self.rows("keys")
        if config.known_task_rows and self.known_tasks is not None:
            known = self.known_tasks.to(query.device).clamp(0, self.task)  # the head says what is wrong with others
            return known[None, :, None].expand(len(keys), -1, -1)
        selected = compare(query, keys, config.similarity).argmax(-1, keepdim=True)
        return batch_vote(selected, self.rows_in_use) if config.batchwise_prompt_at_test else selected

    def _experts(self, place: int, chosen: torch.Tensor, count: int) -> torch.Tensor:
        """Of the last `count` rows, those (2 or 1, B or 1, L, D) that a layer takes in training; one row serves the
        whole batch."""
        prompts = self.prompts[place] if count == self.prompts.shape[2] else self.rows("prompts")[place]
        if prompts.shape[1] == 1:
            return prompts
        rows = chosen[place if self.config.keys_per_layer else 0, :, 0]
        # As an embedding, whose gradient is summed in the same order in every run.
        picked = F.embedding(rows, prompts.transpose(0, 1).flatten(1))
        return picked.unflatten(-1, (len(prompts), *prompts.shape[2:])).transpose(0, 1)

    def _chosen(self, place: int, rows: torch.Tensor) -> torch.Tensor:
        """Past and current rows (2 or 1, B, L, D) of a layer, without a copy of all of them."""
        past, current = self.past("prompts")[place], self.prompts[place]
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
