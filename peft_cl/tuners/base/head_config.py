"""The part of all configurations that says what the head is, what it sees, and what becomes of prompts under it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from transformers.utils import logging

from ...backbones import Geometry
from ...heads import CLS, HEADS, OWN, Features, Head, Sizes, make_head
from ...heads.checks import check_count, check_number
from .formats import format_needed


logger = logging.get_logger(__name__)

#: The head of the preset "best" on frozen features: kernel LDA of the CLS token and the mean of the patches in the
#: last layers. Settings were chosen on held back training images (`benchmarks/heads.py --holdout 0.2`).
KERNEL_LDA = {"fourier": 2000, "shrinkage": 0.1}
BEST_FROZEN = {"head": "lda", "head_options": KERNEL_LDA, "head_features": "cls+mean", "head_layers": None}
#: With prompts: what this head says of the frozen features, and LDA of the prompted ones.
BEST = {
    "head": "fusion",
    "head_options": {
        "prompted": "lda",
        "prompted_options": {"shrinkage": 0.03},
        "query": "lda",
        "query_options": KERNEL_LDA,
    },
    "head_features": "cls+mean",
    "head_layers": None,
    "train_prompts": "first_task",
}
#: Below it, logits divided by a temperature are no numbers any more.
LEAST_TEMPERATURE = 1e-3
#: With `head_layers=None` the head sees at most so many layers, and at most so many numbers of an image: the square of
#: the latter has to be kept.
MOST_LAYERS, MOST_NUMBERS = 6, 3072


@dataclass
class HeadConfig(PeftConfig):
    """Base of `PromptPoolConfig`, which has the facts of the adapter that this reads."""

    head: str = field(
        default="linear",
        metadata={
            "help": "What turns features into logits: linear (the papers), cosine, ncm, lda, ridge, aligned, fusion, "
            "text (class names, with CLIP and SigLIP), or a head of your own (register_head)."
        },
    )
    head_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings of the head, by the names in its docstring."}
    )
    head_features: str | None = field(
        default=None,
        metadata={
            "help": "What the head sees: 'cls', 'mean' (of the patches) or 'cls+mean', each after the final norm, and "
            "'+query' for those of the frozen model too. None: what the method's paper reads."
        },
    )
    head_layers: int | None = field(
        default=1,
        metadata={
            "help": "Of how many of the last layers the head sees these features (of all, if there are fewer). None: "
            "of up to 6, as long as they are no more than 3,072 numbers, which the model's width decides."
        },
    )
    train_prompts: Literal["every_task", "first_task"] = field(
        default="every_task",
        metadata={
            "help": "Whether prompts are learnt in every task (the papers) or in the first one and are frozen then, "
            "so that what a head has observed stays exact."
        },
    )
    drift_compensation: Literal["means", "map"] | None = field(
        default=None,
        metadata={
            "help": "How sums of a head follow prompts that go on learning: class means by the drift of nearby "
            "images, all sums by a linear map, or None."
        },
    )
    head_init: Literal["default", "zeros", "trunc_normal"] = field(
        default="default",
        metadata={
            "help": "Initialisation of a new class's row in the head: PyTorch's default, zeros, or normal (std 0.02)."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "In evaluation, logits are divided by it (temperature scaling); written by calibrate."},
    )

    method: ClassVar[str] = "prompt pool"

    def __post_init__(self):
        super().__post_init__()
        #: The backbone's, from the moment that the adapter is in one.
        self.geometry: Geometry | None = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, in the format that has the temperature: it is fitted after the configuration was made."""
        before = self.format_version
        self.format_version = max(before, format_needed(self))
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.format_version = before

    def forget_temperature(self) -> None:
        """Put the temperature back to 1, with a warning if it was another: it was fitted on other classes."""
        if self.temperature != 1.0:
            logger.warning(
                "The adapter's temperature was %.4g, fitted on the classes that it had, and is 1 again, as its "
                "classes change. Fit it anew afterwards, by peft_cl.reliability.calibrate or by fit_temperature of "
                "the trainer's arguments.",
                self.temperature,
            )
            self.temperature = 1.0

    def _check_head(self) -> None:
        check_number("temperature", self.temperature, least=LEAST_TEMPERATURE, most=1e6)
        if not isinstance(self.head_options, dict):
            raise ValueError(f"head_options is {self.head_options!r}, but must be a dict of the head's own settings.")
        kind = self._kind_of_head()
        if self.head_features is None and kind.needs_features:
            self.head_features = kind.needs_features
        features = self.features
        if kind.needs_features and kind.needs_features not in features.parts:
            raise ValueError(
                f"head_features is {self.head_features!r}, but head={self.head!r} reads {kind.needs_features!r}. Name "
                f"it too, as in '{kind.needs_features}+{self.head_features}'."
            )
        check_count("head_layers", self.head_layers, or_none=True)
        if self.head_features is None and self.head_layers != 1:
            raise ValueError(
                f"head_layers is {self.head_layers}, but head_features is None, which is what the paper reads of the "
                "last layer. Set head_features, for instance to 'cls+mean'."
            )
        # Without prompts the features that a head sees are the frozen model's: one of both needs no more.
        both = kind.needs_query and not kind.guides_prompts
        for name, wanted in (("head", both), ("head_features", features is not None and features.query)):
            if wanted and not self.has_query:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which reads the frozen model's features beside the prompted "
                    f"ones, but here there is no pass of the frozen model besides. Set {name} to another."
                )
        if self.task_evidence and kind.observes:
            raise ValueError(
                f"task_evidence is {self.task_evidence}, but head={self.head!r} compares classes of different tasks "
                "by itself. Set task_evidence to 0."
            )
        if self.drift_compensation and (not kind.observes or self.train_prompts == "first_task"):
            raise ValueError(
                f"drift_compensation is {self.drift_compensation!r}, but head={self.head!r} with train_prompts="
                f"{self.train_prompts!r} has no sums that prompts could move. Leave it at None."
            )
        self.format_version = max(self.format_version, format_needed(self))

    def _kind_of_head(self) -> Head:
        """A head without rows and numbers: options may ask for any size."""
        with torch.device("meta"):
            return make_head(self.head, Sizes(2, 2), 0, self.head_options)

    @property
    def has_query(self) -> bool:
        """Whether there is a pass of the frozen model beside the prompted one."""
        return True

    @property
    def features(self) -> Features | None:
        """What the head sees; None: what the method's paper reads."""
        if self.head_features is None:
            return None
        has_cls = self.geometry is None or self.geometry.has_cls
        return Features.parse(self.head_features, self.head_layers or 1, has_cls)

    @property
    def query_features(self) -> Features:
        """What the frozen model's features of an image are made of, from the first task on."""
        features = self.features if self.tasks else None
        if features is None:
            reads_cls = self.has_query or self.geometry is None or self.geometry.reads_cls
            return CLS if reads_cls else OWN
        if not self.has_query:
            return features
        return features.of_query if features.query or HEADS[self.head].needs_query else CLS

    @property
    def query_width(self) -> int:
        """Numbers of an image's query, Q, once the adapter is in a backbone."""
        return self.query_features.width(self.geometry.hidden_size, self.geometry.own_width)

    def set_head_layers(self, geometry: Geometry) -> None:
        """Settle how many layers of this backbone the head sees: of those that are as wide as the last one."""
        if self.head_layers is None:
            parts = len(Features.parse(self.head_features, 1, geometry.has_cls).parts)
            self.head_layers = max(1, min(MOST_LAYERS, MOST_NUMBERS // (parts * geometry.hidden_size)))
        self.head_layers = min(self.head_layers, geometry.alike_at_the_end)

    @property
    def prompts_frozen(self) -> bool:
        """Whether the prompts have learnt all that they will."""
        return self.train_prompts == "first_task" and self.num_tasks > 1

    @property
    def title(self) -> str:
        """The method's name in tables and cards."""
        kind = self._kind_of_head()
        title = self.method if self.head == "linear" else f"{self._features_title} + {kind.title}"
        return f"{title} with task evidence" if self.task_evidence else title

    @property
    def _features_title(self) -> str:
        """What the features of a head are called in tables."""
        return self.method
