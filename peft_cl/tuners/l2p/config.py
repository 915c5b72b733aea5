"""Configuration of L2P."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peft.utils.peft_types import PeftType

from ...backbones import Geometry
from ...heads.checks import check_count, check_number
from ..base.head_config import BEST
from ..base.key_config import KeyPoolConfig
from ..base.pool_size import AUTO
from ..base.search import check_faiss


#: L2P in the prefix form that the CODA-Prompt paper compares with.
L2P_PLUS_PLUS = {
    "pool_size": 30,
    "prompt_length": 20,
    "top_k": 5,
    "pull_coefficient": 1.0,
    "pull_form": "cosine_distance",
    "prompt_type": "prefix",
    "head_type": "cls",
    "init": "unit_uniform",
}


@dataclass
class L2PConfig(KeyPoolConfig):
    """Learning to Prompt (Wang et al., CVPR 2022, arXiv 2112.08654): one pool, the top-N prompts of each image.

    Presets: `best` (ours: the preset of choice, see `BEST`; as prefix), `paper` (the paper's constants), `google` (the
    official JAX code's CIFAR-100 file), `jhlee` (the PyTorch port), `l2p++` and `deep` (prefix forms of the CODA-
    Prompt paper), `textbook` (plain form with squared distance and an MLP on the query).

    Example:
        >>> L2PConfig(pool_size=20, top_k=4).prompt_length
        5
        >>> L2PConfig(pool_size=3, top_k=4)
        Traceback (most recent call last):
        ValueError: top_k is 4, but the pool holds only pool_size 3 prompts. Lower top_k or enlarge pool_size.
    """

    pool_size: int | str = field(
        default=10,
        metadata={"help": "Prompts in the pool (M); 'auto': 2 a task or one for 5 classes, at least 10."},
    )
    prompt_length: int = field(
        default=5,
        metadata={"help": "Rows of a prompt (L_p). As prefix the first half are keys and the second half values."},
    )
    top_k: int = field(default=5, metadata={"help": "Prompts chosen for each image (N)."})
    pull_coefficient: float = field(default=0.5, metadata={"help": "Weight of the term that pulls keys (lambda)."})
    prompt_type: Literal["tokens", "prefix"] = field(
        default="tokens",
        metadata={"help": "Tokens in front of the sequence (L2P), or prefix keys and values (L2P++, Deep L2P++)."},
    )
    layers: list[int | float] | str = field(
        default_factory=lambda: [0],
        metadata={
            "help": "Layers that get a prefix, from 0; or fractions of the depth, such as 0.0 and 0.25; or 'all'. "
            "Tokens enter at layer 0."
        },
    )
    prompt_positions: Literal["none", "cls"] = field(
        default="none",
        metadata={"help": "Position embedding of the prompt tokens: none (official), or the CLS token's (ports)."},
    )
    head_type: Literal["prompt", "cls", "cls+prompt", "mean"] = field(
        default="prompt",
        metadata={
            "help": "What the head reads: mean of the prompt outputs, what the backbone's own classifier does (ViT: "
            "CLS), mean of prompt outputs and CLS, mean of all tokens."
        },
    )
    batchwise_prompt: bool = field(
        default=False,
        metadata={"help": "In training, the whole batch takes the N prompts chosen most often in it."},
    )
    use_prompt_mask: bool = field(
        default=False,
        metadata={
            "help": "In training, task t takes the rows tN..(t+1)N instead of choosing; at test, the choice is among "
            "the rows of the tasks seen."
        },
    )
    shared_prompt_pool: bool = field(
        default=False, metadata={"help": "The rows tN..(t+1)N start task t as a copy of the task before."}
    )
    frequency_penalty: bool = field(
        default=False,
        metadata={
            "help": "In training, distances are multiplied by how often a prompt was chosen in earlier tasks (the "
            "paper's diversified selection)."
        },
    )
    selection: Literal["topk", "soft", "threshold"] = field(
        default="topk",
        metadata={
            "help": "The top_k prompts as they are (L2P); each times top_k times the softmax of its similarity "
            "(soft); or those of at least selection_threshold, the best one in the others' place (threshold)."
        },
    )
    selection_temperature: float = field(
        default=0.1, metadata={"help": "selection='soft': what similarities are divided by before the softmax."}
    )
    selection_threshold: float = field(
        default=0.0, metadata={"help": "selection='threshold': the least similarity, from -1 to 1 for a cosine."}
    )
    search: Literal["exact", "faiss"] = field(
        default="exact",
        metadata={
            "help": "How keys are found in evaluation: all are compared, or a graph is searched (FAISS, an extra), "
            "which pays for pools of tens of thousands of keys."
        },
    )

    method: ClassVar[str] = "L2P"
    layer_fields: ClassVar[tuple[str, ...]] = ("layers",)
    for_prefixes: ClassVar[str] = ", an even prompt_length and head_type='cls'"
    presets: ClassVar[dict] = {
        "best": {
            **BEST,
            "prompt_type": "prefix",
            "prompt_length": 4,
            "layers": [0, 1, 2, 3, 4],
            "keys_per_layer": True,
            "head_type": "cls",
            "head_init": "zeros",
        },
        "paper": {"pool_size": 10, "prompt_length": 5, "top_k": 5, "pull_coefficient": 0.5, "head_init": "zeros"},
        "google": {
            "pool_size": 10,
            "prompt_length": 10,
            "top_k": 4,
            "pull_coefficient": 1.0,
            "batchwise_prompt": True,
            "head_init": "zeros",
        },
        "jhlee": {
            "pool_size": 10,
            "prompt_length": 5,
            "top_k": 5,
            "pull_coefficient": 0.1,
            "batchwise_prompt": True,
            "prompt_positions": "cls",
            "init": "wide_uniform",
            "head_init": "trunc_normal",
        },
        "l2p++": L2P_PLUS_PLUS,
        "deep": {**L2P_PLUS_PLUS, "layers": [0, 1, 2, 3, 4], "keys_per_layer": True},
        "textbook": {
            "pool_size": 20,
            "prompt_length": 5,
            "top_k": 5,
            "pull_coefficient": 1.0,
            "pull_form": "squared_distance",
            "query_projection": "mlp",
            "head_type": "cls",
            "init": "normal",
        },
    }

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.L2P
        self._check_positive("prompt_length", "top_k")
        self._check_pool_size()
        self._check_not_negative("pull_coefficient")
        self._check_layers("layers")
        self._check_selection()
        self._check_rows()
        if self.prompt_type == "prefix":
            self._check_even("prompt_length")
            if self.head_type in ("prompt", "cls+prompt"):
                raise ValueError(
                    f"head_type is {self.head_type!r}, but a prefix has no outputs to read: set head_type to 'cls'."
                )
            if self.prompt_positions != "none":
                raise ValueError("prompt_positions is 'cls', but only tokens have positions: set it to 'none'.")
        elif self.layers != [0] or self.keys_per_layer:
            raise ValueError(
                f"layers is {self.layers} and keys_per_layer {self.keys_per_layer}, but tokens enter once, at layer "
                "0. Set prompt_type='prefix' to prompt other layers."
            )

    def _check_pool_size(self) -> None:
        super()._check_pool_size()
        if self.pool_size is None:
            check_count("pool_size", self.pool_size)
        if self.pool_size != AUTO and self.top_k > self.pool_size:
            raise ValueError(
                f"top_k is {self.top_k}, but the pool holds only pool_size {self.pool_size} prompts. Lower top_k or "
                "enlarge pool_size."
            )

    def _check_selection(self) -> None:
        check_number("selection_temperature", self.selection_temperature, above=0)
        bounds = {"least": -1, "most": 1} if self.similarity == "cosine" else {}
        check_number("selection_threshold", self.selection_threshold, **bounds)
        if self.selection == "threshold" and (self.batchwise_prompt or self.batchwise_prompt_at_test):
            raise ValueError(
                "selection is 'threshold', but with batchwise_prompt or batchwise_prompt_at_test the batch chooses, "
                "not the image. Set these to False."
            )
        if self.search == "faiss":
            check_faiss()
        if self.known_task_rows and not self.use_prompt_mask:
            raise ValueError(
                "known_task_rows is True, but without use_prompt_mask no rows belong to a task. Set use_prompt_mask="
                "True."
            )
        if self.shared_prompt_pool and self.past_rows == "frozen":
            raise ValueError(
                "shared_prompt_pool is True, which writes into rows from the beginning of the pool, but past_rows is "
                "'frozen'. Set shared_prompt_pool to False, or past_rows to 'trained'."
            )
        if self.use_prompt_mask and self.growth is not None:
            raise ValueError(
                f"growth is {self.growth!r}, but with use_prompt_mask each task has rows of its own. Set growth to "
                "None, or use_prompt_mask=False."
            )

    @property
    def rows_per_task(self) -> int | None:
        return self.top_k if self.use_prompt_mask else None

    @property
    def prompted_layers(self) -> tuple[int, ...]:
        return tuple(self.layers)

    def check_backbone(self, geometry: Geometry) -> None:
        super().check_backbone(geometry)
        if self.head_type == "cls+prompt" and not geometry.has_cls_token:
            raise ValueError(
                "head_type is 'cls+prompt', but the base model has no CLS token. Set it to 'prompt', 'mean' or 'cls' "
                "(what the base model's own classifier reads)."
            )

    def check_stream(self) -> None:
        super().check_stream()
        if self.frequency_penalty:
            raise ValueError(
                "frequency_penalty is True, which counts the choices of earlier tasks, but a stream has none. Set it "
                "to False."
            )
        if self.use_prompt_mask:
            raise ValueError(
                "use_prompt_mask is True, which gives each task rows of its own, but a stream has no tasks. Set it to "
                "False."
            )

    def check_next_task(self, index: int) -> None:
        if self.use_prompt_mask and (index + 1) * self.top_k > self.pool_size:
            raise ValueError(
                f"pool_size is {self.pool_size}, but with use_prompt_mask task {index + 1} needs "
                f"{(index + 1) * self.top_k} rows (top_k {self.top_k} for each task). Enlarge pool_size."
            )
