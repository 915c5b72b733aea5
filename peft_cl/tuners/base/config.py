"""What the configurations of all methods share: the facts of the adapter, presets and validation."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig
from torch import nn

from ...assets.resolving import portable_name
from ...backbones import Geometry
from ...heads import HEADS
from ...heads.checks import check_count
from ...text import brief
from .facts import LARGEST_WEIGHT, check_facts
from .formats import FORMAT_VERSION
from .head_config import HeadConfig
from .saved import check_saved_files


#: In the place of a list of layers.
ALL = "all"


@dataclass
class PromptPoolConfig(HeadConfig):
    """Base of the methods' configurations; not used by itself.

    Settings are checked when the object is made: a field's type hint, where it is a `Literal` or `bool`, says what it
    may be; a method checks the rest in its own `__post_init__`. `classes`, `tasks` and `rows_in_use` are facts of the
    adapter that `begin_task` writes and `save_pretrained` keeps; nobody sets them by hand.
    """

    train_mask: bool = field(
        default=True,
        metadata={
            "help": "In training, take the cross-entropy over the classes of the current task only (the others' "
            "logits are -inf), as all three papers do; from a stream, over the classes in the batch. False: over all "
            "classes seen."
        },
    )
    task_evidence: float = field(
        default=0.0,
        metadata={
            "help": "In evaluation, add this times the cosine of the query with a task's mean query to the logits of "
            "the task's classes. 0 (the papers): off, and the mean queries are not kept."
        },
    )
    query_projection: Literal["linear", "mlp"] | None = field(
        default=None,
        metadata={
            "help": "Learnable map of the query before it meets the keys: a linear layer, or Linear-ReLU-Linear. "
            "None (the papers): the frozen feature itself."
        },
    )
    interpolate_pos_encoding: bool = field(
        default=False,
        metadata={
            "help": "Images may be of another size than the backbone's: its position embeddings are interpolated, in "
            "training, prediction and pipelines alike."
        },
    )
    storage_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Number format of prompts on disk and of past rows in memory; computing stays float32."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "The encoder and the head, filled in from the model's family. Leave at None."},
    )
    classes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the head's rows, in order: the classes learnt, or the base model's before the first "
            "task (written)."
        },
    )
    tasks: list[list[int]] | None = field(
        default=None, metadata={"help": "For each task seen, the head rows of its classes (written)."}
    )
    rows_in_use: int | None = field(
        default=None, metadata={"help": "Pool rows that take part in the prediction (written)."}
    )
    stream: bool = field(
        default=False, metadata={"help": "Whether it is learnt from a stream without task boundaries (written)."}
    )
    base_weights: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Digests of the backbone's weights, rounded to bfloat16 and to float16 (written)."},
    )
    format_version: int = field(default=1, metadata={"help": "Version of the adapter's file format (written)."})

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Fields that name layers.
    layer_fields: ClassVar[tuple[str, ...]] = ()
    #: What else has to be set where prompts enter as prefixes.
    for_prefixes: ClassVar[str] = ""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.format_version, bool) or not isinstance(self.format_version, int):
            raise ValueError(f"format_version is {brief(self.format_version)}, but must be a whole number.")
        # Adapters of earlier versions name the folder on the machine where they were made.
        self.base_model_name_or_path = portable_name(self.base_model_name_or_path)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version is {self.format_version}, but this peft_cl reads formats up to {FORMAT_VERSION}: the "
                "adapter was written by a newer peft_cl. Upgrade with `pip install -U peft-cl`."
            )
        for name, choices in _choices_of(type(self)).items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {brief(value)}, but must be one of {', '.join(map(repr, choices))}.")
        check_facts(self)
        self._check_not_negative("task_evidence")
        self._check_head()
        #: Where the adapter was loaded from, and the words that it took; the sums of its head lie there.
        self.source: tuple[str, dict[str, Any]] | None = None
        self._saved: dict[str, Any] | None = None

    @classmethod
    def from_preset(cls, name: str, **overrides: Any):
        """Make a configuration from a published setting.

        Args:
            name: one of `cls.presets` (see the class's docstring).
            **overrides: fields that differ from the preset.

        Raises:
            ValueError: no such preset; the message lists them.

        Example:
            >>> from peft_cl import L2PConfig
            >>> L2PConfig.from_preset("paper", top_k=3).pool_size
            10
        """
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; choose one of {', '.join(sorted(cls.presets))}.")
        return cls(**{**copy.deepcopy(dict(cls.presets[name])), **overrides})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """PEFT's `from_pretrained`, which also refuses a damaged weight file beside a local config by its name.

        The weights are loaded later with a message that names no file; this is the one place of ours on that way.
        """
        check_saved_files(Path(pretrained_model_name_or_path, subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.source = str(pretrained_model_name_or_path), {"subfolder": subfolder, **kwargs}
        config._saved = config._sizes()
        return config

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it; the embedded backbone by its name, which holds on every machine."""
        facts = super().to_dict()
        return {**facts, "base_model_name_or_path": portable_name(facts["base_model_name_or_path"])}

    @property
    def is_as_saved(self) -> bool:
        """Whether it was loaded, and nothing was changed since that the adapter's sizes depend on."""
        return self._saved is not None and self._saved == self._sizes()

    def _sizes(self) -> dict[str, Any]:
        foreign = {each.name for each in fields(PeftConfig)} | {"target_modules", "head_layers"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in foreign}

    # ----------------------------------------------------------------------------------------------- tasks

    @property
    def num_tasks(self) -> int:
        """Tasks begun so far."""
        return len(self.tasks or ())

    def add_task(self, class_names: Sequence[str]) -> int:
        """Record the next task; nothing is written unless all of it is in order.

        Args:
            class_names: names of the task's classes; those of earlier tasks keep their rows, new ones are appended.

        Returns:
            The number of classes known before.

        Raises:
            ValueError: no names, names that are no strings, repeated names, or a pool that cannot hold another task.
        """
        names = _checked_names(class_names)
        if self.stream:
            raise ValueError(
                "The adapter is learnt from a stream, which has no tasks: another cannot begin. Start with a new "
                "adapter."
            )
        self.check_task(self.num_tasks)
        known = self.classes if self.tasks else []
        classes = list(dict.fromkeys([*known, *names]))
        row = {name: index for index, name in enumerate(classes)}
        self.classes = classes
        self.tasks = [*(self.tasks or ()), [row[name] for name in names]]
        return len(known)

    def add_classes(self, class_names: Sequence[str]) -> int:
        """Record new classes of the task begun last; nothing is written unless all of it is in order.

        Returns:
            The number of classes known before.

        Raises:
            ValueError: no names, names that are no strings, repeated or known names, or no task has begun.
        """
        names = _checked_names(class_names)
        if not self.tasks:
            raise ValueError("No task has begun that classes could be added to. Call begin_task(names) instead.")
        known = [name for name in names if name in self.classes]
        if known:
            raise ValueError(f"{brief(known)} are classes that the adapter knows already. Leave them out.")
        count = len(self.classes)
        self.classes = [*self.classes, *names]
        self.tasks = [*self.tasks[:-1], [*self.tasks[-1], *range(count, len(self.classes))]]
        return count

    def add_stream(self, class_names: Sequence[str]) -> None:
        """Record that all is learnt from one stream with these classes.

        Raises:
            ValueError: as `add_task`, or tasks were begun before, or a setting needs tasks.
        """
        if self.tasks:
            raise ValueError(
                f"The adapter has begun {self.num_tasks} tasks, but a stream has none. Start it with a new adapter."
            )
        self.check_stream()
        self.add_task(class_names)
        self.stream = True

    def check_stream(self) -> None:
        """Refuse settings that need tasks."""
        if self.train_prompts == "first_task":
            raise ValueError(
                "train_prompts is 'first_task', but a stream has no tasks. Set train_prompts='every_task'."
            )
        if self.drift_compensation:
            raise ValueError(
                f"drift_compensation is {self.drift_compensation!r}, but a stream has no tasks before and after which "
                "images could be looked at. Leave it at None."
            )
        if self.task_evidence:
            raise ValueError(
                f"task_evidence is {self.task_evidence}, but a stream has no tasks to weigh. Set it to 0."
            )

    def check_task(self, index: int) -> None:
        """Refuse task `index` (from 0) if the adapter cannot hold it."""
        self.check_next_task(0 if self.train_prompts == "first_task" else index)

    def check_next_task(self, index: int) -> None:
        """Refuse task `index` (from 0) if the pool cannot hold it. Pools that grow or are shared hold any number."""

    # ----------------------------------------------------------------------------------------------- backbone

    @property
    def prompted_layers(self) -> tuple[int, ...]:
        """Encoder layers at which prompts enter, ascending, counted from 0."""
        return ()

    def settle(self, geometry: Geometry, base: nn.Module) -> None:
        """Take up what depends on the classification model `base`; refuse what does not go into it."""
        self.geometry = geometry
        self.check_backbone(geometry)
        self.set_head_layers(geometry)
        self.head_options = dict(HEADS[self.head].settle(self.head_options, base))

    def check_backbone(self, geometry: Geometry) -> None:
        """Settle which layers `"all"` and fractions are; refuse layers and forms that the backbone does not have."""
        num_layers = geometry.num_layers
        for name in self.layer_fields:
            setattr(self, name, _settled(getattr(self, name), num_layers))
        if geometry.why_no_tokens and self.prompted_layers and getattr(self, "prompt_type", None) == "tokens":
            raise ValueError(
                f"prompt_type is 'tokens', but {geometry.why_no_tokens}. Set prompt_type='prefix'"
                + self.for_prefixes
                + "."
            )
        outside = [layer for layer in self.prompted_layers if layer >= num_layers]
        if outside:
            raise ValueError(
                f"layers {brief(outside)} are out of range: the base model has {num_layers} layers, counted 0 to "
                f"{num_layers - 1}. Set the layers of {type(self).__name__} within that range."
            )

    # ----------------------------------------------------------------------------------------------- checks

    def _check_positive(self, *names: str) -> None:
        for name in names:
            check_count(name, getattr(self, name))

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST_WEIGHT:
                raise ValueError(
                    f"{name} is {brief(value)}, but must be a number of at least 0 (0 switches the term off) and at "
                    f"most {LARGEST_WEIGHT:,.0f}."
                )

    def _check_layers(self, name: str, *, empty_allowed: bool = False) -> None:
        """Layers are kept as a sorted list of distinct whole numbers from 0; as `"all"` or as fractions of the depth
        until the backbone is known."""
        value = getattr(self, name)
        if value == ALL:
            return
        layers = list(value) if isinstance(value, (list, tuple, range, set)) else [None]
        if not (all(map(_is_number, layers)) or (all(map(_is_fraction, layers)) and layers)):
            raise ValueError(
                f"{name} is {brief(value)}, but must be a list of whole numbers, counted from 0; or of fractions of "
                "the backbone's depth, from 0.0 to below 1.0; or 'all'."
            )
        if len(set(layers)) != len(layers):
            raise ValueError(f"{name} is {brief(layers)}, but each layer may be named once. Leave the others out.")
        if not layers and not empty_allowed:
            raise ValueError(f"{name} is empty, but at least one layer must be prompted, for instance [0].")
        setattr(self, name, sorted(layers))

    def _check_even(self, name: str) -> None:
        value = getattr(self, name)
        if value % 2:
            raise ValueError(
                f"{name} is {value}, but a prefix needs an even number: its first half are keys, its second half "
                f"values. Set it to {value + 1}."
            )


def _checked_names(class_names: Sequence[str]) -> list[str]:
    """The names of classes, which are texts, one at least, and distinct."""
    if isinstance(class_names, str):
        raise ValueError(f"class_names is the string {class_names!r}, but must be a list of names, one per class.")
    names = list(class_names)
    if not names:
        raise ValueError("class_names is empty, but a task has at least one class. Name it.")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"class_names holds {wrong[:5]}, but names are strings. Convert them with str().")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"class_names repeats {repeated}: name each class of a task once.")
    return names


def _is_number(layer: Any) -> bool:
    return isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0


def _is_fraction(layer: Any) -> bool:
    return isinstance(layer, float) and 0 <= layer < 1


def _settled(layers: list[int | float] | str | None, num_layers: int) -> list[int] | None:
    """Layers by their numbers in a backbone of this depth: fraction f is layer floor(f * depth)."""
    if layers == ALL:
        return list(range(num_layers))
    if layers is None or all(map(_is_number, layers)):
        return layers
    return sorted({int(fraction * num_layers) for fraction in layers})


@cache
def _choices_of(config_class: type) -> dict[str, tuple]:
    """Field name -> the values that its type hint names, for fields of a `Literal` (or None) or `bool` type."""
    hints = get_type_hints(config_class)
    found = {}
    for config_field in fields(config_class):
        hint = hints[config_field.name]
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if bool in parts or any(get_origin(part) is Literal for part in parts):
            choices = [(True, False) if part is bool else get_args(part) or (None,) for part in parts]
            found[config_field.name] = sum(choices, ())
    return found
