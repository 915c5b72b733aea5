"""What the configurations of all methods with a pool of prompts share: how its rows begin, grow and are held apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ...backbones import Geometry
from ...heads.checks import check_count, check_number
from ...text import brief
from .config import PromptPoolConfig
from .facts import check_joined
from .initialisation import FROM_ADAPTER, PATCHES, check_source
from .pool_size import AUTO, suggested_pool_size


#: Terms over pairs of rows that `orthogonality` names; what each is stands in `similarity.py`.
OrthogonalityForm = Literal["gram", "pairwise", "products", "signed"]


@dataclass
class PoolConfig(PromptPoolConfig):
    """Base of the configurations of L2P, DualPrompt and CODA-Prompt; not used by itself.

    `grown` is a fact of the adapter that `grow_pool` writes.
    """

    similarity: Literal["cosine", "dot"] = field(
        default="cosine",
        metadata={"help": "How a query is compared with keys: by the cosine (the papers), or the plain dot product."},
    )
    key_size: int | None = field(
        default=None,
        metadata={"help": "Numbers of a key; query_projection maps the query to as many. None: the model's width."},
    )
    query_layer: int | float | None = field(
        default=None,
        metadata={
            "help": "The layer whose CLS output is the query, from 0; or a fraction of the depth. The query pass ends "
            "there. None: the last one (the papers)."
        },
    )
    token_order: Literal["prompts_first", "cls_first"] = field(
        default="prompts_first",
        metadata={
            "help": "Tokens as [prompts; CLS; patches] or [CLS; prompts; patches]: attention knows no order, so only "
            "hidden states and attentions differ."
        },
    )
    init: Literal[
        "uniform", "wide_uniform", "unit_uniform", "normal", "near_zero", "orthogonal", "patches", "adapter"
    ] = field(
        default="uniform",
        metadata={
            "help": "Prompts and keys begin as U[0, 0.01) (L2P, DualPrompt), U(-1, 1) (ports), U[0, 1), normal (std "
            "0.02), near_zero (std 0.0001) or orthogonal to all earlier rows (CODA-Prompt); prompts as patch "
            "embeddings of training images (patches), or as those of another adapter (adapter)."
        },
    )
    init_from: str | None = field(
        default=None, metadata={"help": "The adapter of init='adapter': a local folder or a Hub name."}
    )
    init_layers: Literal["independent", "hierarchical"] = field(
        default="independent",
        metadata={
            "help": "Whether the prompts of each layer begin by themselves, or as those of the prompted layer before "
            "plus noise."
        },
    )
    init_noise: float = field(
        default=0.02, metadata={"help": "Standard deviation of that noise (init_layers='hierarchical')."}
    )
    key_init: Literal["init", "queries"] = field(
        default="init", metadata={"help": "Keys begin as init says, or as queries of training images."}
    )
    growth: Literal["every_task", "adaptive"] | None = field(
        default=None,
        metadata={
            "help": "How a pool whose rows all tasks share grows: in every task after the first, or where the new "
            "task's images find it full (growth_similarity, growth_entropy). None: by grow_pool alone."
        },
    )
    growth_size: int = field(default=5, metadata={"help": "Rows that a growth adds."})
    max_pool_size: int | None = field(default=None, metadata={"help": "Rows at which growth ends. None: it goes on."})
    growth_similarity: float = field(
        default=0.5,
        metadata={
            "help": "Adaptive growth: a pool is full if the images' best cosine with a key is below it, on average."
        },
    )
    growth_entropy: float = field(
        default=0.95,
        metadata={"help": "Adaptive growth: a pool is full if the evenness of choices (entropy, 0 to 1) is above it."},
    )
    past_rows: Literal["trained", "frozen"] = field(
        default="trained",
        metadata={"help": "Whether rows from before a growth go on learning, or take part as they are."},
    )
    orthogonality_coefficient: float = field(
        default=0.0,
        metadata={"help": "Weight of the orthogonality term (mu; CODA-Prompt's paper 0.1, its published scripts 0)."},
    )
    orthogonality: OrthogonalityForm = field(
        default="pairwise",
        metadata={
            "help": "Its form: gram, mean((R R' - I)^2) (CODA-Prompt: over P, K and A); pairwise, absolute cosines of "
            "prompts; products, their absolute products; signed, their products with sign."
        },
    )
    orthogonality_scope: Literal["layer", "global"] = field(
        default="layer",
        metadata={"help": "Rows are compared layer by layer, or over all layers joined."},
    )
    adaptive_orthogonality: bool = field(
        default=False,
        metadata={
            "help": "The coefficient is 0.05 in a task whose images are like those of an earlier one (cosine of mean "
            "queries above 0.8) and 0.5 in another, in place of orthogonality_coefficient."
        },
    )
    diversity_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the term that lowers the cosines of different prompts."}
    )
    alignment_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the mean squared difference of a key and its prompt's mean row."}
    )
    entropy_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the term that raises the entropy of the mean selection."}
    )
    grown: list[int] | None = field(
        default=None, metadata={"help": "Rows that each growth of the pool added (written)."}
    )
    joined: list[list[int]] | None = field(
        default=None,
        metadata={
            "help": "Of each adapter that was joined, but the last: how many rows of its pool, and tasks (written)."
        },
    )
    joined_prompts: Literal["apart", "together"] = field(
        default="apart",
        metadata={
            "help": "Of a joined adapter: an image takes the prompts of one of the adapters, which it fits best, or "
            "those of all take part (written)."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_not_negative(
            "orthogonality_coefficient", "diversity_coefficient", "alignment_coefficient", "entropy_coefficient"
        )
        check_number("init_noise", self.init_noise, least=0)
        check_count("key_size", self.key_size, or_none=True)
        if self.key_size is not None and self.query_projection is None:
            raise ValueError(
                f"key_size is {self.key_size}, but query_projection is None, so nothing maps the query to so many "
                "numbers. Set query_projection='linear'."
            )
        self._check_query_layer()
        self._check_init()
        self._check_growth()
        if self.adaptive_orthogonality and self.orthogonality_coefficient:
            raise ValueError(
                f"orthogonality_coefficient is {self.orthogonality_coefficient}, but with adaptive_orthogonality each "
                "task has its own. Set orthogonality_coefficient to 0."
            )

    # ----------------------------------------------------------------------------------------------- rows

    @property
    def shares_rows(self) -> bool:
        """Whether all tasks choose among the same rows, and train them."""
        return True

    @property
    def size_option(self) -> str:
        """The setting that makes all tasks share the rows, in words."""
        return "pool_size"

    def set_pool_size(self, num_tasks: int, num_classes: int) -> None:
        """Settle `pool_size="auto"`, once the scenario is known.

        Raises:
            ValueError: the pool does not go with another setting.
        """
        if self.pool_size == AUTO:
            self.pool_size = suggested_pool_size(num_tasks, num_classes)
            self._check_pool_size()

    def _check_pool_size(self) -> None:
        """Refuse what is no number of rows, or does not go with another setting; `"auto"` is looked at later."""
        if self.pool_size == AUTO and not self.shares_rows:
            raise ValueError(
                "pool_size is 'auto', but each task has rows of its own here. Set pool_size to None, or let the tasks "
                f"share the rows: {self.size_option}."
            )
        if self.pool_size not in (None, AUTO):
            check_count("pool_size", self.pool_size)

    @property
    def total_rows(self) -> int:
        """Rows of a pool that is shared, with those that it has grown."""
        return self.pool_size + sum(self.grown or ())

    @property
    def current_count(self) -> int:
        """Of a pool that is shared: rows that learn."""
        return self.total_rows - self.past_count

    @property
    def past_count(self) -> int:
        """Of a pool that is shared: rows that learn no more."""
        from_before = self.total_rows - self.grown[-1] if self.grown and self.past_rows == "frozen" else 0
        return max(from_before, self.rows_apart)

    @property
    def rows_per_task(self) -> int | None:
        """Rows that each task brings; None: all tasks share the rows."""
        return None

    @property
    def rows_apart(self) -> int:
        """Rows of adapters that were joined and are kept apart, but the last one's: they learn no more."""
        return sum(rows for rows, _ in self.joined) if self.is_apart else 0

    @property
    def is_apart(self) -> bool:
        """Whether it was joined, and an image takes the prompts of one of the adapters."""
        return bool(self.joined) and self.joined_prompts == "apart"

    @property
    def parts_can_be_apart(self) -> bool:
        """Whether keys can say which of several joined adapters an image fits."""
        return self.has_query

    def take_sizes(self, total: int, others: list[PoolConfig]) -> None:
        """Settle the sizes of a pool of `total` rows that are those of others; it learns on with the last one's."""
        if self.shares_rows:
            last, frozen = others[-1], self.past_rows == "frozen" and len(others) > 1
            self.grown = last.grown or ([last.total_rows] if frozen else None)
            self.pool_size = total - sum(self.grown or ())
            self.max_pool_size = _sum_of([each.max_pool_size for each in others])
        else:
            self.pool_size = _sum_of([each.pool_size for each in others])

    def grow(self, count: int) -> None:
        """Record that the pool has grown."""
        self.grown = [*(self.grown or ()), count]

    def growth_allowed(self, count: int) -> int:
        """How many of `count` rows there is room for."""
        return count if self.max_pool_size is None else max(0, min(count, self.max_pool_size - self.total_rows))

    # ----------------------------------------------------------------------------------------------- checks

    def _check_query_layer(self) -> None:
        layer = self.query_layer
        if layer is None:
            return
        is_number = isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
        if not is_number and not (isinstance(layer, float) and 0 <= layer < 1):
            raise ValueError(
                f"query_layer is {brief(layer)}, but must be a whole number, counted from 0; or a fraction of the "
                "depth, from 0.0 to below 1.0; or None."
            )
        if not self.has_query:
            raise ValueError(
                f"query_layer is {layer}, but the query is the layer's own input (query_source), with no query pass. "
                "Leave it at None."
            )
        kind = self._kind_of_head()
        if kind.needs_query or (self.features is not None and self.features.query):
            raise ValueError(
                f"query_layer is {layer}, but head={self.head!r} with head_features={self.head_features!r} reads the "
                "frozen model's last layer in the query pass. Leave query_layer at None, or take another head."
            )

    def _check_init(self) -> None:
        if (self.init == FROM_ADAPTER) != (self.init_from is not None):
            raise ValueError(
                f"init is {self.init!r} and init_from {brief(self.init_from)}, but the two go together. Set "
                "init='adapter' with the adapter's folder or Hub name, or neither."
            )
        for name, value in (("key_init", "queries"), ("growth", "adaptive")):
            if getattr(self, name) == value and not self.has_query:
                raise ValueError(
                    f"{name} is {value!r}, but keys meet the layer's own input (query_source), of which there is none "
                    f"before the pass. Leave {name} at its default, or set query_source='pretrained'."
                )
        if self.init_layers == "hierarchical" and self.init == FROM_ADAPTER:
            raise ValueError("init_layers is 'hierarchical', but init='adapter' has rows for each layer. Set one.")

    def _check_growth(self) -> None:
        check_count("growth_size", self.growth_size)
        check_number("growth_similarity", self.growth_similarity, least=-1, most=1)
        check_number("growth_entropy", self.growth_entropy, least=0, most=1)
        check_count("max_pool_size", self.max_pool_size, or_none=True)
        grown = self.grown
        counts = isinstance(grown, list) and all(type(count) is int and count > 0 for count in grown)
        if grown is not None and not counts:
            raise ValueError(f"grown is {brief(grown)}, but must be a list of whole numbers of at least 1.")

    def _check_rows(self) -> None:
        """Called by a method once its own settings are in order."""
        check_joined(self)
        if self.token_order != "prompts_first" and self.prompt_type != "tokens":
            raise ValueError(
                f"token_order is {self.token_order!r}, but prompt_type is {self.prompt_type!r}, which adds no tokens. "
                "Leave token_order at 'prompts_first', or set prompt_type='tokens'."
            )
        if self.growth and self.train_prompts == "first_task":
            raise ValueError(
                f"growth is {self.growth!r}, but with train_prompts='first_task' no later task trains prompts. Set "
                "one of the two to its default."
            )
        if not self.shares_rows:
            for name, default in (
                ("growth", None),
                ("max_pool_size", None),
                ("grown", None),
                ("past_rows", "trained"),
            ):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is {brief(getattr(self, name))}, but each task has rows of its own here. Leave it at "
                        f"{default!r}, or let the tasks share the rows: {self.size_option}."
                    )
            return
        if self.pool_size != AUTO and self.max_pool_size is not None and self.max_pool_size < self.total_rows:
            raise ValueError(
                f"max_pool_size is {self.max_pool_size}, but the pool has {self.total_rows} rows. Set it to "
                f"{self.total_rows} or more, or lower pool_size."
            )

    def settle(self, geometry: Geometry, base: nn.Module) -> None:
        if self.pool_size == AUTO:
            raise ValueError(
                "pool_size is 'auto', but here the scenario is not known (`peft-cl train` knows it). Set it to "
                "suggested_pool_size(num_tasks, num_classes), or call set_pool_size with these."
            )
        super().settle(geometry, base)
        if isinstance(self.query_layer, float):
            self.query_layer = int(self.query_layer * geometry.num_layers)
        if self.query_layer is not None:
            if self.query_layer >= geometry.num_layers:
                raise ValueError(
                    f"query_layer is {self.query_layer}, but the base model has {geometry.num_layers} layers, counted "
                    f"0 to {geometry.num_layers - 1}. Set one of them, or None."
                )
            if geometry.size_at([self.query_layer]) != geometry.hidden_size:
                raise ValueError(
                    f"query_layer is {self.query_layer}, but its width is {geometry.size_at([self.query_layer])}, and "
                    f"queries have {geometry.hidden_size} numbers. Set it to one of the last "
                    f"{geometry.alike_at_the_end} layers, or None."
                )
        width = geometry.size_at(self.prompted_layers)
        if self.alignment_coefficient and self.key_width(geometry) != width:
            raise ValueError(
                f"alignment_coefficient is {self.alignment_coefficient}, but keys have {self.key_width(geometry)} "
                f"numbers and rows of prompts {width}: they cannot be compared. Set it to 0."
            )
        if self.init == PATCHES and geometry.size_at([0]) != width:
            raise ValueError(
                f"init is 'patches', but embeddings of patches have {geometry.size_at([0])} numbers, and prompts of "
                f"layers {list(self.prompted_layers)} have {width}. Set init to another, or prompt the first layers."
            )
        if self.init == FROM_ADAPTER and not self.tasks and self.source is None:
            check_source(self.init_from)

    def key_width(self, geometry: Geometry) -> int:
        """Numbers of a key."""
        return self.key_size or geometry.hidden_size

    @property
    def wants_images(self) -> bool:
        """Whether a task begins with a look at its images."""
        return (
            self.init == PATCHES
            or self.key_init == "queries"
            or self.growth == "adaptive"
            or self.adaptive_orthogonality
        )


def _sum_of(limits: list[int | None]) -> int | None:
    """The limit of several pools together; None: one of them has none."""
    return None if None in limits else sum(limits)
