"""DualPrompt's pool: a general prompt, and one expert row a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..base.pool import Geometry
from ..base.prompts import Injection, Prompts
from ..base.row_pool import RowPool
from ..base.shares import Share
from ..base.similarity import batch_vote, compare
from ..base.storage import storage_dtype
from .config import DualPromptConfig


class DualPromptPool(RowPool):
    """Parameters: `g_prompts` (g of the paper), (G layers, 2, L_g, D); `prompts` (e_t), (E layers, 2, rows, L_e, D);
    `keys` (k_t), (key sets, rows, D). On the axis of 2 stand keys and values; as tokens it is an axis of 1. `prompts`
    and `keys` hold the current task's row, `past_prompts` and `past_keys` those before. For a stream, and with
    `expert_choice="key"`, they hold all rows, from which each image takes the one with the nearest key, in training
    too. Without expert layers there is `g_prompts` alone. Of adapters that were joined and are kept apart,
    `past_g_prompts`, (adapters but the last, G layers, 2, L_g, D), has the general prompts of all but the last.
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
        if config.is_apart:
            dtype = storage_dtype("past_g_prompts", config)
            self.register_buffer("past_g_prompts", torch.zeros(len(config.joined), *general, dtype=dtype))
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
        if not self.row_axes:
            return Prompts(self._inject(self._general(None), {}))
        if self.training:
            # Of a task there is one row, which all take: those of earlier tasks are not compared.
            keys = self.rows("keys") if config.shares_rows else self.keys
            similarity = compare(query, keys, config.similarity)  # (sets, B, rows)
            chosen = self._nearest(similarity) if config.shares_rows else similarity.argmax(-1, keepdim=True)
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
        general, parts = self._general(selected), {}
        if self.training and config.separation_coefficient:
            parts = {"general": Prompts(self._inject(general, {})), "expert": Prompts(self._inject({}, experts))}
        return Prompts(self._inject(general, experts), losses, selected.squeeze(0), parts)

    def _choose(self, query: torch.Tensor) -> torch.Tensor:
        """(sets, B, 1) rows, at test."""
        config, keys = self.config, self.rows("keys")
        if config.known_task_rows and self.known_tasks is not None:
            known = self.known_tasks.to(query.device).clamp(0, self.task)  # the head says what is wrong with others
            return known[None, :, None].expand(len(keys), -1, -1)
        selected = self._nearest(compare(query, keys, config.similarity))
        return batch_vote(selected, self.rows_in_use) if config.batchwise_prompt_at_test else selected

    def _nearest(self, similarity: torch.Tensor) -> torch.Tensor:
        """(sets, B, 1) rows of the nearest keys, from the similarities (sets, B, rows)."""
        out_of_part = self.out_of_part(similarity)
        if out_of_part is not None:
            similarity = similarity.masked_fill(out_of_part, -torch.inf)
        return similarity.argmax(-1, keepdim=True)

    def _general(self, selected: torch.Tensor | None) -> dict[int, torch.Tensor]:
        """General prompts (2 or 1, B or 1, L, D) of each layer: where several are kept apart, at test, those of the
        adapter that the rows (sets, B, 1) chosen for an image are of."""
        past = getattr(self, "past_g_prompts", None)
        if past is None or self.training or selected is None:
            return {layer: self.g_prompts[place][:, None] for place, layer in enumerate(self.config.g_layers)}
        ends = selected.new_tensor([part.rows[-1] for part in self.parts[:-1]])
        part = torch.bucketize(selected[0, :, 0], ends)
        every = self.general_of_parts()
        return {layer: every[:, place][part].transpose(0, 1) for place, layer in enumerate(self.config.g_layers)}

    @torch.no_grad()
    def take(self, shares: Sequence[Share]) -> None:
        super().take(shares)
        every = torch.cat([share.pool.general_of_parts()[share.part_numbers] for share in shares])
        if hasattr(self, "past_g_prompts"):
            self.past_g_prompts.copy_(every[:-1])
            self.g_prompts.copy_(every[-1])
        else:
            self.g_prompts.copy_(every.mean(0))

    def general_of_parts(self) -> torch.Tensor:
        """The general prompts of each part, (parts, G layers, 2 or 1, L, D)."""
        past = getattr(self, "past_g_prompts", None)
        if past is None:
            return self.g_prompts.expand(len(self.parts), *self.g_prompts.shape)
        return torch.cat([past.to(self.g_prompts), self.g_prompts[None]])

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
