"""The base of all pools: parameters of one adapter that turn a query into prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...backbones import Geometry
from .config import PromptPoolConfig
from .parts import Part
from .prompts import Prompts


if TYPE_CHECKING:
    from .shares import Share


class PromptPool(nn.Module):
    """Parameters of one adapter. A method subclasses it and defines `select`, and what happens at a task's start.

    A pool knows nothing of the backbone's modules, of the trainer or of files. It is built for the number of tasks
    that its config has seen, so a saved adapter finds its shapes.

    Rows of past tasks, where a method keeps them apart, are buffers `past_<name>` beside the parameters `<name>`, not
    parameters with a zero gradient: no optimizer (momentum, weight decay) can move them, and their cost in gradients
    and optimizer state is nothing, however many tasks there were.

    Args:
        config: the method's configuration; the pool reads it and never writes it.
        geometry: facts of the backbone.
    """

    #: Whether `select` needs the frozen model's feature of the image, that is, a query pass.
    needs_query = True

    #: Whether the prompted pass would only be the query pass again: a query that is given then is the feature.
    query_is_feature = False

    #: The tasks of the images of this call, (B,), where they are known; the encoder sets it.
    known_tasks: torch.Tensor | None = None

    #: What the head says of each task of the images of this call by the frozen features, (B, tasks); the encoder sets
    #: it where the pool asks for it.
    task_scores: torch.Tensor | None = None
    asks_for_tasks = False

    #: What the head reads: what the base model's own classifier does (`"cls"`: in ViT it is that token), or an output
    #: of the prompt tokens, `"prompt"`, `"cls+prompt"`, `"mean"` (of all).
    head_type = "cls"

    #: The layer whose CLS output is the query, where the query pass ends; None: the last one.
    query_layer: int | None = None

    #: Whether prompt tokens stand behind the special tokens, and not in front.
    behind_cls = False

    #: Parameters with rows of past tasks, and the axis of the rows, counted from the end.
    row_axes: Mapping[str, int] = {}

    def __init__(self, config: PromptPoolConfig, geometry: Geometry):
        super().__init__()
        self.config = config
        self.geometry = geometry
        size = geometry.hidden_size
        self.query_projection = _projection(config.query_projection, size, getattr(config, "key_size", None) or size)

    @property
    def task(self) -> int:
        """The current task t, from 0. Before the first `begin_task` the pool is in its task 0; a pool that learns in
        the first task alone stays in it."""
        return 0 if self.config.train_prompts == "first_task" else max(self.config.num_tasks - 1, 0)

    @property
    def is_frozen(self) -> bool:
        """Whether it has learnt all that it will."""
        return self.config.prompts_frozen

    def train(self, mode: bool = True):
        """A frozen pool stays in evaluation mode: it chooses as at test, and has no loss terms."""
        return super().train(mode and not self.is_frozen)

    @property
    def renewed(self) -> dict[str, nn.Parameter]:
        """Parameters that a task begins anew; of a stream, which is one task, none."""
        names = () if self.config.stream else self.row_axes
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @property
    def first_layer(self) -> int:
        """The lowest encoder layer that prompts enter; what is below is done once for both passes."""
        return 0

    @property
    def rows_in_use(self) -> int:
        """Rows that take part in a prediction now."""
        raise NotImplementedError(f"{type(self).__name__} must say how many of its rows take part in a prediction")

    def take_over(self) -> None:
        """Make the pool ready for task 0. Default: nothing changes."""

    def begin_task(self, index: int) -> None:
        """Make the pool ready for task `index` (from 1; task 0 is how a pool is made). Default: nothing changes."""

    def begin_stream(self) -> None:
        """Make the pool ready for a stream without task boundaries. Default: nothing changes."""

    @property
    def parts(self) -> list[Part]:
        """The rows and tasks of each adapter that was joined; of another adapter, all of them are one part."""
        return [Part(range(self.rows_in_use), range(self.config.num_tasks))]

    def take(self, shares: Sequence[Share]) -> None:
        """Have these shares of other pools, one behind the other, in the place of what there is. Default: there is
        nothing to take."""

    def forward(self, query: torch.Tensor | None) -> Prompts:
        """Prompts for a batch.

        Args:
            query: (B, D) features of the frozen model, or None if `needs_query` is False.
        """
        if query is None:
            return self.select(None)
        return self.select(self.mapped(query))

    def mapped(self, query: torch.Tensor) -> torch.Tensor:
        """The query (B, D) as it meets the keys.

        They decide by small differences of cosines, so it takes their precision (float32, unless the user cast the
        whole model), not the frozen model's.
        """
        return self.query_projection(query.to(next(self.parameters()).dtype))

    def select(self, query: torch.Tensor | None) -> Prompts:
        """Choose the prompts of a batch for its mapped query (B, D). In training, add the method's loss terms."""
        raise NotImplementedError(f"{type(self).__name__} must define select(query)")

    def compare(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss terms from the features (B, D) that each of `Prompts.parts` gives alone."""
        raise NotImplementedError(f"{type(self).__name__} asks for parts but does not define compare(features)")

    def merge_counts(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Join what each process counted during a task; `total` sums a tensor over the processes. Default: nothing."""

    def _grow(self, name: str, rows: torch.Tensor) -> None:
        """Start new rows for the parameter `name`; its present rows join the buffer `past_<name>`."""
        current = getattr(self, name)
        past = getattr(self, f"past_{name}")
        past = torch.cat([past, current.detach().to(past)], dim=self.row_axes[name])
        setattr(self, f"past_{name}", past)
        setattr(self, name, nn.Parameter(rows.to(current), requires_grad=current.requires_grad))

    def rows(self, name: str) -> torch.Tensor:
        """All rows of `name`, those of past tasks first; they take part without a gradient."""
        past = getattr(self, f"past_{name}")
        current = getattr(self, name)
        return torch.cat([past.to(current), current], dim=self.row_axes[name]) if past.numel() else current

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters())
        return f"{shapes}, rows_in_use={self.rows_in_use}"


def _projection(kind: str | None, size: int, key_size: int) -> nn.Module:
    """The learnable query map. The linear one starts as the identity: training begins from the papers' query; to keys
    of another size as an orthogonal map, which keeps cosines as well as a map can."""
    if kind is None:
        return nn.Identity()
    if kind == "linear":
        linear = nn.Linear(size, key_size)
        (nn.init.eye_ if key_size == size else nn.init.orthogonal_)(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, key_size))
