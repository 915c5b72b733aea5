"""Configuration of DualPrompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peft.utils.peft_types import PeftType

from ..base.head_config import BEST
from ..base.key_config import KeyPoolConfig


@dataclass
class DualPromptConfig(KeyPoolConfig):
    """DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799): a general prompt for all tasks, an expert row for each.

    Presets: `best` (ours: the preset of choice, see `BEST`), `paper` (CIFAR-100), `imagenet-r` (20 expert rows),
    `coda` (the CODA-Prompt repository's DualPrompt: keys per layer, summed distance), `textbook` (both prompts as
    tokens, with an MLP on the query).

    Example:
        >>> DualPromptConfig.from_preset("imagenet-r").prompt_length
        20
    """

    pool_size: int | str | None = field(
        default=10,
        metadata={
            "help": "Expert rows the adapter may hold, one a task (M), or those that all tasks share (expert_choice="
            "'key'; 'auto': 2 a task or one for 5 classes, at least 10). None: as many as there come tasks."
        },
    )
    prompt_length: int = field(
        default=5,
        metadata={"help": "Rows of an expert prompt (L_e): as prefix, so many for keys and as many for values."},
    )
    g_prompt_length: int = field(
        default=5,
        metadata={"help": "Rows of the general prompt (L_g): as prefix, so many for keys and as many for values."},
    )
    layers: list[int | float] | str = field(
        default_factory=lambda: [2, 3, 4],
        metadata={
            "help": "Layers with the expert prompt, from 0; or fractions of the depth; or 'all'. Empty: the general "
            "prompt alone."
        },
    )
    g_layers: list[int | float] | str = field(
        default_factory=lambda: [0, 1], metadata={"help": "Layers with the general prompt, likewise; may be empty."}
    )
    pull_coefficient: float = field(default=1.0, metadata={"help": "Weight of the term that pulls the task's key."})
    shared_prompt_pool: bool = field(
        default=True, metadata={"help": "A task's expert row starts as a copy of the row of the task before."}
    )
    prompt_type: Literal["prefix", "tokens"] = field(
        default="prefix",
        metadata={"help": "Prefix keys and values (the paper's choice), or tokens [G; E; CLS; patches] at layer 0."},
    )
    expert_choice: Literal["task", "key"] = field(
        default="task",
        metadata={
            "help": "In training an image takes the expert of its task (the paper), or the one with the nearest key "
            "of pool_size that all tasks share."
        },
    )
    train_g_prompts: Literal["every_task", "first_task"] = field(
        default="every_task",
        metadata={"help": "Whether the general prompt learns in every task (the paper), or in the first one alone."},
    )
    separation_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the squared covariance of the features under G alone and E alone (no such term in the "
            "paper; it costs two more passes)."
        },
    )

    method: ClassVar[str] = "DualPrompt"
    layer_fields: ClassVar[tuple[str, ...]] = ("layers", "g_layers")
    presets: ClassVar[dict] = {
        "best": {
            **BEST,
            "prompt_length": 10,
            "layers": [2, 3, 4, 5],
            "pool_size": None,
            "head_init": "zeros",
        },
        "paper": {"head_init": "zeros"},
        "imagenet-r": {"prompt_length": 20, "head_init": "zeros"},
        "coda": {
            "prompt_length": 10,
            "g_prompt_length": 3,
            "keys_per_layer": True,
            "pull_form": "cosine_distance",
            "pull_reduction": "sum",
            "shared_prompt_pool": False,
            "init": "unit_uniform",
        },
        "textbook": {
            "prompt_type": "tokens",
            "layers": [0],
            "g_layers": [0],
            "expert_choice": "key",
            "query_projection": "mlp",
            "init": "normal",
        },
    }

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.DUALPROMPT
        self._check_positive("prompt_length", "g_prompt_length")
        self._check_pool_size()
        self._check_not_negative("pull_coefficient", "separation_coefficient")
        self._check_choice()
        self._check_rows()
        self._check_layers("layers", empty_allowed=True)
        self._check_layers("g_layers", empty_allowed=True)
        if not self.layers and not self.g_layers:
            raise ValueError(
                "layers is empty and g_layers is empty too, but one of the two prompts must be there. Set layers to "
                "[2, 3, 4], or g_layers to [0, 1]."
            )
        if not self.layers and self.keys_per_layer:
            raise ValueError(
                "layers is empty, so there is no expert prompt, but keys_per_layer is True. Set keys_per_layer=False."
            )
        if self.prompt_type == "tokens" and any(each not in ([0], []) for each in (self.layers, self.g_layers)):
            raise ValueError(
                f"layers is {self.layers} and g_layers {self.g_layers}, but tokens enter once, at layer 0. Set both "
                "to [0], or prompt_type='prefix'."
            )
        for name, prompt in (("g_layers", "general"), ("layers", "expert")):
            if self.separation_coefficient and not getattr(self, name):
                raise ValueError(
                    f"separation_coefficient is {self.separation_coefficient}, but {name} is empty: there is no "
                    f"{prompt} prompt to separate from. Name its layers or set the coefficient to 0."
                )

    def _check_choice(self) -> None:
        by_key = self.expert_choice == "key"
        if by_key and self.pool_size is None:
            raise ValueError(
                "pool_size is None, so the pool has a row for each task, but expert_choice is 'key', for which all "
                "tasks share the rows. Set pool_size to their number, for instance 10."
            )
        if by_key and self.known_task_rows:
            raise ValueError(
                "known_task_rows is True, but with expert_choice='key' no row belongs to a task. Set one of the two "
                "to its default."
            )
        if self.entropy_coefficient and not by_key:
            raise ValueError(
                f"entropy_coefficient is {self.entropy_coefficient}, but in training an image has no choice: it takes "
                "its task's expert. Set it to 0, or expert_choice='key'."
            )

    @property
    def shares_rows(self) -> bool:
        return self.expert_choice == "key"

    @property
    def rows_per_task(self) -> int | None:
        return None if self.shares_rows or not self.layers else 1

    @property
    def parts_can_be_apart(self) -> bool:
        return bool(self.layers)

    @property
    def size_option(self) -> str:
        return "expert_choice='key'"

    @property
    def prompted_layers(self) -> tuple[int, ...]:
        return tuple(sorted({*self.layers, *self.g_layers}))

    def check_stream(self) -> None:
        super().check_stream()
        if self.pool_size is None:
            raise ValueError(
                "pool_size is None, so the pool has a row for each task, but a stream has no tasks. Set pool_size to "
                "the number of rows to choose from, for instance 10."
            )

    def check_next_task(self, index: int) -> None:
        if not self.shares_rows and self.pool_size is not None and index >= self.pool_size:
            raise ValueError(
                f"pool_size is {self.pool_size}, but task {index + 1} needs a row of its own: the pool must hold one "
                "for each task. Enlarge pool_size, or set it to None to let the pool grow."
            )
