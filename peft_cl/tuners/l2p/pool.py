"""L2P's pool: the prompts whose keys are nearest to the query."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..base.pool import Geometry
from ..base.prompts import Injection, Prompts
from ..base.row_pool import RowPool
from ..base.search import KeyIndex
from ..base.shares import Share
from ..base.similarity import batch_vote, compare
from .config import L2PConfig


class L2PPool(RowPool):
    """Parameters: `prompts` (P_i of the paper), (layers, M, L, D), and `keys` (k_i), (key sets, M, D).

    As tokens there is one layer and one key set. `chosen_before` and `chosen_now` count selections in training, of
    earlier tasks and of this one; only the diversified selection reads them. With `past_rows="frozen"` the rows from
    before the last growth are `past_prompts` and `past_keys`.
    """

    config: L2PConfig
    row_axes = {"prompts": -3, "keys": -2}

    def __init__(self, config: L2PConfig, geometry: Geometry):
        super().__init__(config, geometry)
        sets = len(config.layers) if config.keys_per_layer else 1
        layers, length = len(config.layers), config.prompt_length
        count = config.current_count
        self._make_rows(
            {
                "prompts": (layers, count, length, geometry.size_at(config.layers)),
                "keys": (sets, count, config.key_width(geometry)),
            },
            config.past_count,
        )
        if config.frequency_penalty:
            self.register_buffer("chosen_before", torch.zeros(sets, config.total_rows))
            self.register_buffer("chosen_now", torch.zeros(sets, config.total_rows))
        self.index = KeyIndex()

    @property
    def head_type(self) -> str:
        return self.config.head_type

    @property
    def first_layer(self) -> int:
        return min(self.config.layers)

    @property
    def rows_in_use(self) -> int:
        config = self.config
        return (self.task + 1) * config.top_k if config.use_prompt_mask else config.total_rows

    def begin_task(self, index: int) -> None:
        super().begin_task(index)
        first, end = index * self.config.top_k, (index + 1) * self.config.top_k
        if self.config.shared_prompt_pool and end <= self.config.pool_size:
            with torch.no_grad():
                first, end = first - self.config.rows_apart, end - self.config.rows_apart
                self.prompts[:, first:end] = self.prompts[:, first - self.config.top_k : first]
        if self.config.frequency_penalty:
            self.chosen_before += self.chosen_now
            self.chosen_now.zero_()

    def grow(self, count: int) -> int:
        added = super().grow(count)
        if self.config.frequency_penalty:
            for name in ("chosen_before", "chosen_now"):
                setattr(self, name, F.pad(getattr(self, name), (0, added)))
        return added

    def take_growth(self, grown: list[int]) -> None:
        super().take_growth(grown)
        if self.config.frequency_penalty:
            for name in ("chosen_before", "chosen_now"):
                setattr(self, name, torch.zeros(len(self.keys), self.config.total_rows, device=self.keys.device))

    def take(self, shares: Sequence[Share]) -> None:
        super().take(shares)
        if self.config.frequency_penalty:
            for name in ("chosen_before", "chosen_now"):
                counts = [getattr(share.pool, name)[:, share.rows] for share in shares]
                unused = [getattr(share.pool, name)[:, share.unused] for share in shares]
                getattr(self, name).copy_(torch.cat([*counts, *unused], dim=-1))

    def merge_counts(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.config.frequency_penalty:
            self.chosen_now = total(self.chosen_now)

    def select(self, query: torch.Tensor) -> Prompts:
        config = self.config
        keys = self.rows("keys")
        similarity, losses = None, {}
        # No graph knows which adapter's rows an image may take.
        if self.training or config.search == "exact" or config.is_apart:
            similarity = compare(query, keys, config.similarity)  # (sets, B, M)
        selected = self._choose(query, keys, similarity)  # (sets, B, N)
        if self.training:
            if config.frequency_penalty:
                self.chosen_now += F.one_hot(selected, config.total_rows).sum(dim=(1, 2))
            losses = self.terms_of_choice(query, keys, similarity, selected)
        selected, weights = self._weigh(query, keys, selected)
        layers = {}
        for place, layer in enumerate(config.layers):
            which = place if config.keys_per_layer else 0
            # Not by indexing: on several CPU threads its gradient is summed in an order that changes from run to run.
            rows = F.embedding(selected[which], self.rows("prompts")[place].flatten(1))
            prompts = rows.unflatten(-1, self.prompts.shape[2:])  # (B, N, L, D)
            if weights is not None:
                prompts = prompts * weights[which][..., None, None]
            if config.prompt_type == "tokens":
                layers[layer] = Injection(tokens=prompts.flatten(1, 2), cls_position=config.prompt_positions == "cls")
            else:
                layers[layer] = Injection.from_halves(prompts)
        return Prompts(layers, losses, selected.squeeze(0))

    def _choose(self, query: torch.Tensor, keys: torch.Tensor, similarity: torch.Tensor | None) -> torch.Tensor:
        """(sets, B, N) rows, from the similarities (sets, B, M) where all are there."""
        config, batch = self.config, (keys.shape[0], query.shape[0])  # not len(), which an export takes for a constant
        own = torch.arange(config.top_k, device=query.device)
        if self.training and config.use_prompt_mask:
            return (own + self.task * config.top_k).expand(*batch, -1)
        if not self.training and config.known_task_rows and self.known_tasks is not None:
            known = self.known_tasks.to(own).clamp(0, self.task)  # the head says what is wrong with others
            return (own + known[:, None] * config.top_k).expand(*batch, -1)
        if similarity is None:
            stamp = [(rows.data_ptr(), rows._version, rows.shape) for rows in (self.keys, self.past("keys"))]
            rows = keys[:, : self.rows_in_use]
            selected = self.index.nearest(query, rows, config.top_k, config.similarity, (stamp, len(rows[0])))
        else:
            if not self.training:
                similarity = similarity[..., : self.rows_in_use]
            elif config.frequency_penalty and self.task > 0:
                frequency = self.chosen_before / self.chosen_before.sum(-1, keepdim=True).clamp_min(1)
                similarity = -(1 - similarity) * frequency[:, None]
            out_of_part = self.out_of_part(similarity)
            if out_of_part is not None:
                similarity = similarity.masked_fill(out_of_part, -torch.inf)
            selected = similarity.topk(config.top_k, dim=-1).indices
        if config.batchwise_prompt if self.training else config.batchwise_prompt_at_test:
            selected = batch_vote(selected, config.total_rows)
        return selected

    def _weigh(
        self, query: torch.Tensor, keys: torch.Tensor, selected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `selection` makes of the chosen rows (sets, B, N): the rows, and their weights of the same shape."""
        config = self.config
        if config.selection == "topk":
            return selected, None
        # As an embedding, whose gradient is summed in the same order in every run.
        chosen = torch.stack([F.embedding(rows, each) for rows, each in zip(selected, keys, strict=True)])
        if config.similarity == "cosine":
            similarity = F.cosine_similarity(query[None, :, None], chosen, dim=-1)
        else:
            similarity = (query[None, :, None] * chosen).sum(-1)
        if config.selection == "soft":
            return selected, config.top_k * (similarity / config.selection_temperature).softmax(-1)
        return torch.where(similarity >= config.selection_threshold, selected, selected[..., :1]), None
