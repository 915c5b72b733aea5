"""L2P's pool: the prompts whose keys are nearest to the query."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..base.initialisation import draw_rows
from ..base.pool import Geometry, PromptPool
from ..base.prompts import Injection, Prompts
from ..base.similarity import batch_vote, cosine, pull_term, selection_entropy_term
from .config import L2PConfig


class L2PPool(PromptPool):
    """Parameters: `prompts` (P_i of the paper), (layers, M, L, D), and `keys` (k_i), (key sets, M, D).

    As tokens there is one layer and one key set. `chosen_before` and `chosen_now` count selections in training, of
    earlier tasks and of this one; only the diversified selection reads them.
    """

    config: L2PConfig

    def __init__(self, config: L2PConfig, geometry: Geometry):
        super().__init__(config, geometry)
        size = geometry.hidden_size
        sets = len(config.layers) if config.keys_per_layer else 1
        layers, length = len(config.layers), config.prompt_length
        rows = config.pool_size, length, geometry.size_at(config.layers)
        self.prompts = nn.Parameter(draw_rows(config.init, layers, *rows))
        self.keys = nn.Parameter(draw_rows(config.init, sets, config.pool_size, size))
        if config.frequency_penalty:
            self.register_buffer("chosen_before", torch.zeros(sets, config.pool_size))
            self.register_buffer("chosen_now", torch.zeros(sets, config.pool_size))

    @property
    def head_type(self) -> str:
        return self.config.head_type

    @property
    def first_layer(self) -> int:
        return min(self.config.layers)

    @property
    def rows_in_use(self) -> int:
        config = self.config
        return (self.task + 1) * config.top_k if config.use_prompt_mask else config.pool_size

    def begin_task(self, index: int) -> None:
        first, end = index * self.config.top_k, (index + 1) * self.config.top_k
        if self.config.shared_prompt_pool and end <= self.config.pool_size:
            with torch.no_grad():
                self.prompts[:, first:end] = self.prompts[:, first - self.config.top_k : first]
        if self.config.frequency_penalty:
            self.chosen_before += self.chosen_now
            self.chosen_now.zero_()

    def merge_counts(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.config.frequency_penalty:
            self.chosen_now = total(self.chosen_now)

    def select(self, query: torch.Tensor) -> Prompts:
        config = self.config
        similarity = cosine(query, self.keys)  # (sets, B, M)
        selected = self._choose(similarity)  # (sets, B, N)
        losses = {}
        if self.training:
            if config.frequency_penalty:
                self.chosen_now += F.one_hot(selected, config.pool_size).sum(dim=(1, 2))
            pull = pull_term(
                query, self.keys, similarity, selected, form=config.pull_form, reduction=config.pull_reduction
            )
            losses["pull"] = config.pull_coefficient * pull
            if config.entropy_coefficient:
                losses["entropy"] = config.entropy_coefficient * selection_entropy_term(similarity)
        layers = {}
        for place, layer in enumerate(config.layers):
            chosen = selected[place if config.keys_per_layer else 0]
            # Not by indexing: on several CPU threads its gradient is summed in an order that changes from run to run.
            rows = F.embedding(chosen, self.prompts[place].flatten(1))
            prompts = rows.unflatten(-1, self.prompts.shape[2:])  # (B, N, L, D)
            if config.prompt_type == "tokens":
                layers[layer] = Injection(tokens=prompts.flatten(1, 2), cls_position=config.prompt_positions == "cls")
            else:
                layers[layer] = Injection.from_halves(prompts)
        return Prompts(layers, losses, selected.squeeze(0))

    def _choose(self, similarity: torch.Tensor) -> torch.Tensor:
        """(sets, B, M) -> (sets, B, N) rows."""
        config = self.config
        if self.training and config.use_prompt_mask:
            rows = torch.arange(config.top_k, device=similarity.device) + self.task * config.top_k
            return rows.expand(*similarity.shape[:2], -1)
        if not self.training:
            similarity = similarity[..., : self.rows_in_use]
        elif config.frequency_penalty and self.task > 0:
            frequency = self.chosen_before / self.chosen_before.sum(-1, keepdim=True).clamp_min(1)
            similarity = -(1 - similarity) * frequency[:, None]
        selected = similarity.topk(config.top_k, dim=-1).indices
        if config.batchwise_prompt if self.training else config.batchwise_prompt_at_test:
            selected = batch_vote(selected, config.pool_size)
        return selected
