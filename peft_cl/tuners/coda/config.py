"""Configuration of CODA-Prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peft.utils.peft_types import PeftType

from ...backbones import Geometry
from ...heads.checks import check_count
from ..base.config import ALL
from ..base.head_config import BEST
from ..base.pool_config import OrthogonalityForm, PoolConfig


@dataclass
class CodaPromptConfig(PoolConfig):
    """CODA-Prompt (Smith et al., CVPR 2023, arXiv 2211.13218): each image's prompt is a weighted sum of components.

    Every task adds components; those of earlier tasks take part, detached. The number of tasks need not be known.

    Presets: `best` (ours: the preset of choice, see `BEST`), `paper` (orthogonality 0.1), `official` (the published
    scripts, orthogonality 0), `textbook` (a pool for every layer, top-1 by the layer's own CLS token, as tokens, with
    pairwise orthogonality and entropy).

    Example:
        >>> CodaPromptConfig.from_preset("paper", components_per_task=5).prompt_length
        8
    """

    components_per_task: int | None = field(
        default=10,
        metadata={
            "help": "Components that each task adds (M/T; the paper's M 100 over 10 tasks). None: all tasks share and "
            "train the pool_size components."
        },
    )
    pool_size: int | str | None = field(
        default=None,
        metadata={
            "help": "Most components the adapter may hold (M), or those that all tasks share ('auto': 2 a task or one "
            "for 5 classes, at least 10). None: as many as there come tasks."
        },
    )
    prompt_length: int = field(
        default=8, metadata={"help": "Rows of a prompt (L_p): as prefix, the first half are keys, the second values."}
    )
    layers: list[int | float] | str | None = field(
        default_factory=lambda: [0, 1, 2, 3, 4],
        metadata={"help": "Layers that are prompted, from 0; or fractions of the depth; or 'all' (as None)."},
    )
    attention: bool = field(
        default=True, metadata={"help": "Multiply the query by each component's attention vector (A, eq. 5)."}
    )
    selection: Literal["weighted", "top1"] = field(
        default="weighted",
        metadata={"help": "Sum of all components weighted by similarity (the paper), or the most similar one alone."},
    )
    query_source: Literal["pretrained", "layer_cls", "layer_mean", "layer_patches"] = field(
        default="pretrained",
        metadata={
            "help": "The query: the frozen model's CLS feature (the paper), or the layer's own input, its CLS token, "
            "its mean or the mean of its patches (one pass, no query pass)."
        },
    )
    prompt_type: Literal["prefix", "tokens"] = field(
        default="prefix",
        metadata={"help": "Prefix keys and values, or tokens put before each layer and taken out after it."},
    )
    init: Literal[
        "orthogonal", "normal", "near_zero", "uniform", "wide_uniform", "unit_uniform", "patches", "adapter"
    ] = field(default="orthogonal", metadata=PoolConfig.__dataclass_fields__["init"].metadata)
    orthogonality: OrthogonalityForm = field(
        default="gram", metadata=PoolConfig.__dataclass_fields__["orthogonality"].metadata
    )

    method: ClassVar[str] = "CODA-Prompt"
    layer_fields: ClassVar[tuple[str, ...]] = ("layers",)
    presets: ClassVar[dict] = {
        "best": {**BEST, "head_init": "zeros"},
        "paper": {"orthogonality_coefficient": 0.1},
        "official": {},
        "textbook": {
            "components_per_task": None,
            "pool_size": 10,
            "prompt_length": 5,
            "layers": None,
            "attention": False,
            "selection": "top1",
            "query_source": "layer_cls",
            "prompt_type": "tokens",
            "orthogonality_coefficient": 1.0,
            "orthogonality": "pairwise",
            "entropy_coefficient": 0.1,
        },
    }

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.CODAPROMPT
        self._check_positive("prompt_length")
        check_count("components_per_task", self.components_per_task, or_none=True)
        if self.components_per_task is None and self.pool_size is None:
            raise ValueError(
                "components_per_task and pool_size are both None, so the pool has no size. Set pool_size to the "
                "components that all tasks share, for instance 10, or components_per_task to those of each task."
            )
        self._check_pool_size()
        self._check_rows()
        if self.layers is not None:
            self._check_layers("layers")
        if self.prompt_type == "prefix":
            self._check_even("prompt_length")
        if self.query_source != "pretrained" and self.query_projection is not None:
            raise ValueError(
                f"query_projection is {self.query_projection!r}, but it maps the query of the query pass, and "
                f"query_source is {self.query_source!r}. Set one of the two to its default."
            )
        if self.query_source != "pretrained" and self.task_evidence:
            raise ValueError(
                f"task_evidence is {self.task_evidence}, but it compares the query of the query pass, and "
                f"query_source is {self.query_source!r}. Set one of the two to its default."
            )

    def _check_pool_size(self) -> None:
        super()._check_pool_size()
        if self.pool_size is not None:
            self.check_next_task(0)

    @property
    def shares_rows(self) -> bool:
        return self.components_per_task is None

    @property
    def rows_per_task(self) -> int | None:
        return self.components_per_task

    @property
    def size_option(self) -> str:
        return "components_per_task=None with pool_size"

    @property
    def has_query(self) -> bool:
        return self.query_source == "pretrained"

    @property
    def prompted_layers(self) -> tuple[int, ...]:
        return tuple(self.layers or ())

    def check_backbone(self, geometry: Geometry) -> None:
        if self.layers is None:
            self.layers = ALL
        super().check_backbone(geometry)
        if self.query_source == "layer_cls" and not geometry.has_cls_token:
            raise ValueError(
                "query_source is 'layer_cls', but the base model has no CLS token. Set it to 'layer_mean', or to "
                "'pretrained'."
            )
        sizes = {geometry.size_at([layer]) for layer in self.layers}
        if self.query_source != "pretrained" and sizes != {geometry.hidden_size}:
            raise ValueError(
                f"query_source is {self.query_source!r}, but the layers are of the widths {sorted(sizes)}, and keys "
                f"have {geometry.hidden_size} numbers. Set query_source='pretrained'."
            )

    def check_next_task(self, index: int) -> None:
        if self.shares_rows:
            return
        needed = (index + 1) * self.components_per_task
        if self.pool_size is not None and needed > self.pool_size:
            raise ValueError(
                f"pool_size is {self.pool_size}, but task {index + 1} needs {needed} components "
                f"(components_per_task {self.components_per_task} for each task). Enlarge pool_size, lower "
                "components_per_task, or set pool_size to None to let the pool grow."
            )
