"""The base of the three methods' pools: how their rows begin, grow, become past ones and are held apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...backbones import Geometry
from .initialisation import (
    FROM_ADAPTER,
    ORTHOGONAL,
    PATCHES,
    RowSpan,
    draw_rows,
    layer_by_layer,
    rows_of_adapter,
    some_of,
)
from .pair_sums import DIVERSITY, FORMS, PairSums
from .parts import Part, best_part, likely_part, outside, parts_of, parts_of_tasks
from .pool import PromptPool
from .pool_config import PoolConfig
from .shares import Share
from .similarity import cosine, evenness, pull_term, selection_entropy_term
from .storage import round_prompts, storage_dtype


#: Adaptive orthogonality (section 9.10 of the specification): the coefficient for tasks that are alike, for others,
#: and from which cosine of their mean queries on they are alike.
ALIKE, UNLIKE, ALIKE_FROM = 0.05, 0.5, 0.8


class RowPool(PromptPool):
    """A pool whose parameters `row_axes` names have a row for each prompt.

    Where tasks share rows (`PoolConfig.shares_rows`) all of them are there from the start, and the pool grows as
    `growth` says; else each task begins with rows of its own. Rows that learn no more are buffers `past_<name>`.
    """

    config: PoolConfig

    def __init__(self, config: PoolConfig, geometry: Geometry):
        super().__init__(config, geometry)
        #: New rows, by name, that begin from images as soon as some are shown.
        self.waiting: dict[str, int] = {}
        self.spans: dict[tuple[str, int], list[RowSpan]] = {}
        self.pair_sums = PairSums()
        if config.adaptive_orthogonality:
            self.register_buffer("mean_queries", torch.zeros(self.task + 1, config.key_width(geometry)))
            self.register_buffer("task_coefficient", torch.tensor(UNLIKE))

    # ----------------------------------------------------------------------------------------------- rows

    def _make_rows(self, shapes: dict[str, tuple[int, ...]], past: int) -> None:
        """Make parameters of these shapes, with the rows that a pool of this configuration begins with, and buffers
        for `past` rows where rows can become past ones."""
        self.shapes = shapes
        if past or not self.config.shares_rows or self.config.past_rows == "frozen":
            for name in shapes:
                dtype = storage_dtype(f"past_{name}", self.config)
                self.register_buffer(f"past_{name}", torch.zeros(self._sized(name, past), dtype=dtype))
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(self.new_rows(name, shape[self.row_axes[name]])))
        self.spans.clear()

    def _sized(self, name: str, count: int) -> tuple[int, ...]:
        shape = list(self.shapes[name])
        shape[self.row_axes[name]] = count
        return tuple(shape)

    def flat(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of `name` as one vector each: (sets, rows, F)."""
        return rows.flatten(2) if self.row_axes[name] == -3 else rows

    def unflat(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The way back from `flat`."""
        return rows.unflatten(-1, self.shapes[name][-2:]) if self.row_axes[name] == -3 else rows

    def past(self, name: str) -> torch.Tensor:
        """Rows of `name` that learn no more; none where there can be none."""
        past = getattr(self, f"past_{name}", None)
        return getattr(self, name).detach().narrow(self.row_axes[name], 0, 0) if past is None else past

    def rows(self, name: str) -> torch.Tensor:
        return super().rows(name) if hasattr(self, f"past_{name}") else getattr(self, name)

    @property
    def query_layer(self) -> int | None:
        return self.config.query_layer

    @property
    def behind_cls(self) -> bool:
        return self.config.token_order == "cls_first"

    @property
    def renewed(self) -> dict[str, nn.Parameter]:
        stays = self.config.shares_rows and self.config.growth is None and self.config.past_rows == "trained"
        return {} if stays else super().renewed

    @property
    def rows_in_use(self) -> int:
        return self.past("keys").shape[-2] + self.keys.shape[-2]

    def new_rows(self, name: str, count: int) -> torch.Tensor:
        """`count` rows of `name`, as `init` and `init_layers` have them begin."""
        config, shape = self.config, self._sized(name, count)
        if config.init == PATCHES and name == "prompts" or config.key_init == "queries" and name == "keys":
            self.waiting[name] = count
        by_layer = name == "prompts" and config.init_layers == "hierarchical"
        if config.init == ORTHOGONAL:
            rows = torch.stack([span.new_rows() for span in self._spans(name, count)[: 1 if by_layer else None]])
            rows = self.unflat(name, rows)
            return layer_by_layer(rows[0], shape[0], config.init_noise) if by_layer else rows
        return self.drawn(shape, by_layer)

    def drawn(self, shape: tuple[int, ...], by_layer: bool) -> torch.Tensor:
        """Rows (layers, ...) as `init` draws them; with `by_layer` each layer's from those of the layer before."""
        if not by_layer:
            return draw_rows(self.config.init, *shape)
        return layer_by_layer(draw_rows(self.config.init, *shape[1:]), shape[0], self.config.init_noise)

    def _spans(self, name: str, count: int) -> list[RowSpan]:
        sets, _, size = self.flat(name, torch.empty(self._sized(name, 1), device="meta")).shape
        return self.spans.setdefault((name, count), [RowSpan(size, count) for _ in range(sets)])

    def _some_rows(self, name: str, place: int, first: int, last: int) -> torch.Tensor:
        """Rows of a layer from `first` to before `last`, of past and current ones, (rows, F)."""
        past, current = (self.flat(name, rows)[place] for rows in (self.past(name), getattr(self, name).detach()))
        parts = past[first:last], current[max(0, first - len(past)) : max(0, last - len(past))]
        return torch.cat([part.to(current) for part in parts])

    def add_rows(self, count: int, **begun: torch.Tensor) -> None:
        """Give each name `count` more rows, those of `begun` or new ones; the present ones become past ones, or go on
        learning with them (`past_rows`)."""
        earlier, learn_on = self.rows_in_use, self.config.shares_rows and self.config.past_rows == "trained"
        if not learn_on:
            round_prompts(self, self.config)  # first: spans and sums are of the rows that are kept
            for key, pairs in self._pair_terms():
                self.pair_sums.add(key, pairs, *self._compared(key[1]))
        for name in self.row_axes:
            rows = begun.get(name)
            if rows is None:
                if self.config.init == ORTHOGONAL:
                    for place, span in enumerate(self._spans(name, count)):
                        span.follow(earlier, partial(self._some_rows, name, place))
                rows = self.new_rows(name, count)
            if learn_on:
                current = getattr(self, name)
                rows = torch.cat([current.detach(), rows.to(current)], dim=self.row_axes[name])
                setattr(self, name, nn.Parameter(rows, requires_grad=current.requires_grad))
            else:
                self._grow(name, rows)

    def grow(self, count: int) -> int:
        """Add up to `count` rows to a pool that the tasks share, as many as `max_pool_size` leaves room for.

        Returns:
            How many were added.
        """
        count = self.config.growth_allowed(count)
        if count:
            self.add_rows(count)
            self.config.grow(count)
        return count

    def take_growth(self, grown: list[int]) -> None:
        """Give the rows the shapes of a run that was interrupted after these growths; their values are to be loaded.

        Images decide whether a pool grows, and tasks that are learnt are not looked at again.
        """
        config = self.config
        config.grown = list(grown)
        for name in self.row_axes:
            current = getattr(self, name)
            if config.past_rows == "frozen":
                dtype = storage_dtype(f"past_{name}", config)
                setattr(self, f"past_{name}", current.new_zeros(self._sized(name, config.past_count), dtype=dtype))
            rows = current.new_zeros(self._sized(name, config.current_count))
            setattr(self, name, nn.Parameter(rows, requires_grad=current.requires_grad))

    def begin_task(self, index: int) -> None:
        self.waiting = {}
        if self.config.adaptive_orthogonality:
            self.mean_queries = F.pad(self.mean_queries, (0, 0, 0, 1))
        if self.config.growth == "every_task":
            self.grow(self.config.growth_size)

    def take_over(self) -> None:
        """At the first task's start: the rows of the adapter that `init_from` names. An adapter that was loaded has
        rows, and what it names is not looked for."""
        if self.config.init != FROM_ADAPTER or self.config.source is not None:
            return
        found = rows_of_adapter(self.config.init_from, self.row_axes)
        for name, rows in found.items():
            own, axis = getattr(self, name), self.row_axes[name]
            fits = rows.ndim == own.ndim and rows.shape[axis] >= own.shape[axis]
            first = rows.narrow(axis, 0, own.shape[axis]) if fits else rows
            if first.shape != own.shape:
                raise ValueError(
                    f"init_from is {self.config.init_from!r}, whose {name} are of the shape {tuple(rows.shape)}, but "
                    f"here they are {tuple(own.shape)}. Give prompts of the same length, layers, kind and width, and "
                    "no more rows than there are in that adapter."
                )
            with torch.no_grad():
                own.copy_(first)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._rows_are_others()

    # ----------------------------------------------------------------------------------------------- joined pools

    @property
    def task(self) -> int:
        if self.config.train_prompts == "first_task":  # one for each adapter that was joined
            return len(self.config.joined or ())
        return super().task

    @property
    def parts(self) -> list[Part]:
        return parts_of(self.config, self.rows_in_use)

    @property
    def asks_for_tasks(self) -> bool:
        """Whether the head is asked which adapter an image may be of: where they brought the same classes, it cannot
        tell, and the keys decide."""
        tasks = self.config.tasks
        if not self.config.is_apart or self.training or not self.needs_query:
            return False
        return len({frozenset(row for task in part.tasks for row in tasks[task]) for part in self.parts}) > 1

    def out_of_part(self, similarity: torch.Tensor) -> torch.Tensor | None:
        """Boolean (B, rows): the rows of other adapters than the one whose prompts an image takes; None: it may take
        those of all. In training it takes those of the last one, with which learning goes on.

        Args:
            similarity: of the batch with the keys, (sets, B, rows).
        """
        if not self.config.is_apart:
            return None
        rows = similarity.shape[-1]
        parts = parts_of(self.config, rows)
        if self.training:
            chosen = torch.full(similarity.shape[1:2], len(parts) - 1, device=similarity.device)
        elif self.known_tasks is not None:
            chosen = parts_of_tasks(self.known_tasks.to(similarity.device), parts)
        elif self.task_scores is not None:
            chosen = likely_part(self.task_scores, parts)
        else:
            chosen = best_part(similarity, parts)
        return outside(chosen, parts, rows)

    @torch.no_grad()
    def take(self, shares: Sequence[Share]) -> None:
        for name, axis in self.row_axes.items():
            rows = torch.cat([_rows_at(share.pool.rows(name), axis, share.rows) for share in shares], dim=axis)
            unused = [_rows_at(share.pool.rows(name), axis, share.unused) for share in shares]
            rows, own = torch.cat([rows, *unused], dim=axis), getattr(self, name)
            past = rows.shape[axis] - own.shape[axis]
            if hasattr(self, f"past_{name}"):
                getattr(self, f"past_{name}").copy_(rows.narrow(axis, 0, past))
            own.copy_(rows.narrow(axis, past, own.shape[axis]))
        self.query_projection.load_state_dict(shares[0].pool.query_projection.state_dict())
        if self.config.adaptive_orthogonality:
            means = [share.pool.mean_queries[share.pool_tasks] for share in shares]
            self.mean_queries.copy_(torch.cat(means))
            self.task_coefficient.copy_(shares[-1].pool.task_coefficient)
        self._rows_are_others()

    def _rows_are_others(self) -> None:
        """Forget what was computed from the rows that were there."""
        self.spans.clear()
        self.pair_sums.past.clear()
        self.waiting = {}

    # ----------------------------------------------------------------------------------------------- a look at images

    @torch.no_grad()
    def look(self, query: torch.Tensor, patches: torch.Tensor) -> None:
        """Take from images of the task that has begun what its rows begin with, and grow if they find the pool full.

        Args:
            query: (B, D) features of the frozen model.
            patches: (patches of all images, width) embeddings, before the first layer.
        """
        config = self.config
        query = self.mapped(query)
        if config.growth == "adaptive" and config.num_tasks > 1 and self.is_full(query):
            self.grow(config.growth_size)
        waiting, self.waiting = self.waiting, {}
        for name, count in waiting.items():
            parameter, axis = getattr(self, name), self.row_axes[name]
            last = parameter.narrow(axis, parameter.shape[axis] - count, count)
            if name == "keys":
                last.copy_(some_of(query, last.shape[:-1].numel()).view_as(last))
            else:
                rows = some_of(patches.to(last), last.shape[:-1].numel()).view_as(last)
                layered = config.init_layers == "hierarchical"
                last.copy_(layer_by_layer(rows[0].cpu(), len(rows), config.init_noise) if layered else rows)
        if config.adaptive_orthogonality:
            mean = F.normalize(F.normalize(query, dim=-1).mean(0), dim=-1)
            likeness = (self.mean_queries[:-1] @ mean).max() if len(self.mean_queries) > 1 else mean.new_tensor(-1.0)
            self.mean_queries[-1] = mean
            self.task_coefficient.fill_(ALIKE if likeness > ALIKE_FROM else UNLIKE)

    def is_full(self, query: torch.Tensor) -> bool:
        """Whether images do not find rows of their own: their best cosine with a key is low, or all rows are taken.

        Args:
            query: (B, key width), mapped.
        """
        similarity = cosine(query, self.rows("keys"))
        chosen = similarity.topk(min(getattr(self.config, "top_k", 1), similarity.shape[-1]), dim=-1).indices
        return (
            similarity.max(-1).values.mean().item() < self.config.growth_similarity
            or evenness(chosen, similarity.shape[-1]) > self.config.growth_entropy
        )

    # ----------------------------------------------------------------------------------------------- terms of the loss

    def terms_of_choice(
        self, query: torch.Tensor, keys: torch.Tensor, similarity: torch.Tensor, selected: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The pull of the chosen keys, for methods that choose by keys (`KeyPoolConfig`), and `terms`.

        Args:
            query: (B, key width).
            keys: (sets, rows, key width).
            similarity: of the two, as `similarity` of the configuration has it, (sets, B, rows).
            selected: (sets, B, N) of these rows.
        """
        config = self.config
        cosines = similarity if config.similarity == "cosine" else cosine(query, keys)
        pull = pull_term(query, keys, cosines, selected, form=config.pull_form, reduction=config.pull_reduction)
        return {"pull": config.pull_coefficient * pull, **self.terms(similarity)}

    def terms(self, similarity: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The terms of the loss that hold rows apart, weighted.

        Args:
            similarity: of the batch with the keys, (sets, B, rows); None: nothing is chosen.
        """
        config, losses = self.config, {}
        layers = 1 if config.orthogonality_scope == "global" else len(self.prompts)
        if self._penalised:
            # Gram: mean((R R' - I)^2), summed over layers (CODA-Prompt, eq. 8, as its code has it). Absolute cosines:
            # the sum over ordered pairs, averaged over layers (section 5). Products: summed over layers (section 3).
            form = config.orthogonality
            count = {"gram": self.rows_in_use**2, "pairwise": layers}.get(form, 1)
            penalty = sum(self._total(("orthogonality", name), FORMS[form]) for name in self._penalised) / count
            weight = self.task_coefficient if config.adaptive_orthogonality else config.orthogonality_coefficient
            losses["orthogonality"] = weight * penalty
        if config.diversity_coefficient:  # section 9.5's sum of cosines, averaged over layers
            cosines = self._total(("diversity", "prompts"), DIVERSITY) / layers
            losses["diversity"] = config.diversity_coefficient * cosines
        if config.alignment_coefficient:  # section 7's mse(K, mean of P over its length)
            means = self.flat("prompts", self.prompts).unflatten(-1, (-1, self.prompts.shape[-1])).mean(-2)
            losses["alignment"] = config.alignment_coefficient * (self.keys - means).square().mean()
        if config.entropy_coefficient and similarity is not None:
            losses["entropy"] = config.entropy_coefficient * selection_entropy_term(similarity)
        return losses

    @property
    def _penalised(self) -> list[str]:
        """Names of the parameters that the orthogonality term is of."""
        if not (self.config.orthogonality_coefficient or self.config.adaptive_orthogonality):
            return []
        return list(self.row_axes) if self.config.orthogonality == "gram" else ["prompts"]

    def _pair_terms(self) -> list[tuple[tuple[str, str], Any]]:
        pairs = FORMS[self.config.orthogonality]
        return [(("orthogonality", name), pairs) for name in self._penalised] + [(("diversity", "prompts"), DIVERSITY)]

    def _compared(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Current and past rows (sets, rows, F), as the terms compare them."""
        current = getattr(self, name)
        both = [self.flat(name, rows) for rows in (current, self.past(name).to(current))]
        if self.config.orthogonality_scope == "global":
            both = [rows.transpose(0, 1).flatten(1)[None] for rows in both]
        return both[0], both[1]

    def _total(self, key: tuple[str, str], pairs: Any) -> torch.Tensor:
        current, past = self._compared(key[1])
        return self.pair_sums.total(key, pairs, current, past, max(1, current.shape[1]))


def _rows_at(rows: torch.Tensor, axis: int, places: Sequence[int]) -> torch.Tensor:
    return rows.index_select(axis, torch.tensor(places, dtype=torch.long, device=rows.device))
