"""What one run is: a configuration turned into checked objects, before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset
from transformers.processing_utils import ImagesKwargs

from ..hub.card import NOT_SETTINGS
from ..scenarios import (
    RandomResizedCropFlip,
    Scenario,
    class_incremental,
    dataset_sequence,
    domain_incremental,
    task_free,
    task_incremental,
)
from ..trainer import ContinualTrainingArguments, Strategy
from ..tuners.base.config import PromptPoolConfig
from .errors import CommandError, explained, unknown
from .methods import METHODS, STRATEGIES, Method
from .options import check_names, fill


SECTIONS = (
    "model",
    "processor",
    "method",
    "preset",
    "adapter",
    "continue_from",
    "strategy",
    "dataset",
    "scenario",
    "augmentation",
    "training",
    "output_dir",
)
SCALED_RATE = "learning_rate_per_256"
#: The kind of scenario that has several data sets, and the name of the one that all other kinds have.
SEQUENCE, ONLY = "dataset-sequence", ""


@dataclass(frozen=True)
class ModelSettings:
    """The section `model`; a text in its place is the name."""

    name: str = field(metadata={"help": "Hub name, local folder, or vit-tiny-64, which comes with peft_cl."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Number format of the frozen backbone; the adapter is float32 always."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa or flash_attention_2. null: transformers' own choice."}
    )


@dataclass(frozen=True)
class DatasetSettings:
    """The section `dataset`, a text in its place is the path; or one of several by name, for a dataset-sequence."""

    path: str = field(metadata={"help": "Hub name, or a local folder of images or parquet files."})
    name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set that has several."})
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. null: the only one with an Image feature."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str = field(default="test", metadata={"help": "Split to measure on."})
    test_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of each class that becomes the test split, for data with one split only; test_split is "
            "not read then."
        },
    )
    split_seed: int = field(
        default=0, metadata={"help": "Draws the test fraction; of its own, so that all training seeds share a split."}
    )

    def __post_init__(self) -> None:
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}, but must lie between 0 and 1, such as 0.2.")


@dataclass(frozen=True)
class ScenarioSettings:
    """The section `scenario`: how the data becomes a sequence of tasks."""

    kind: Literal["class-incremental", "task-incremental", "domain-incremental", "dataset-sequence", "task-free"] = (
        field(
            default="class-incremental",
            metadata={
                "help": "New classes in each task, the task unknown or known at test; the same classes in new "
                "domains; a data set after the other; or one stream in which classes come and go."
            },
        )
    )
    num_tasks: int | None = field(
        default=None, metadata={"help": "Number of tasks that the classes are divided into."}
    )
    classes_per_task: list[int] | None = field(
        default=None, metadata={"help": "Number of classes of each task, in place of num_tasks."}
    )
    first_task_classes: int | None = field(
        default=None, metadata={"help": "Number of classes of the first task; the other tasks divide the rest."}
    )
    class_order: list[str | int] | None = field(
        default=None, metadata={"help": "Class names or label ids, in order. null: as seed says."}
    )
    domain_column: str | None = field(
        default=None, metadata={"help": "Column of the domains (domain-incremental only). null: 'domain'."}
    )
    domain_order: list[str | int] | None = field(
        default=None, metadata={"help": "Names or ids of domains, in order. null: as seed says."}
    )
    seed: int | None = field(
        default=None, metadata={"help": "Draws the order of classes or domains. null: the data's own order."}
    )
    shared_classes: bool | None = field(
        default=None,
        metadata={
            "help": "Whether classes of one name in two data sets are one class (dataset-sequence only). null: no."
        },
    )
    blur: float | None = field(
        default=None,
        metadata={"help": "Spread of a group of classes in the stream, in widths of a stretch (task-free only)."},
    )
    passes: int | None = field(
        default=None, metadata={"help": "How often each image comes in the stream (task-free only). null: once."}
    )
    stream_seed: int | None = field(default=None, metadata={"help": "Draws the stream (task-free only). null: 0."})

    def __post_init__(self) -> None:
        known = _arguments_of(self.kind)
        given = [name for name, value in vars(self).items() if name != "kind" and value is not None]
        foreign = [name for name in given if name not in known]
        if foreign:
            raise ValueError(f"{', '.join(foreign)} does not go with the kind {self.kind}. Take it out.")
        if "num_tasks" in known and self.num_tasks is None and self.classes_per_task is None:
            raise ValueError("num_tasks is missing: the number of tasks that the classes are divided into. Give it.")
        for order in ("class_order", "domain_order"):
            if self.seed is not None and getattr(self, order) is not None:
                raise ValueError(f"seed {self.seed} and {order} both set the order. Give one of them.")

    def make(self, data: Mapping[str, tuple[Dataset, Dataset]], settings: Mapping[str, DatasetSettings]) -> Scenario:
        """Make the scenario from the training and test split of each data set and its settings."""
        given = {name: value for name, value in vars(self).items() if name != "kind" and value is not None}
        if self.kind == SEQUENCE:
            labels = {name: each.label_column for name, each in settings.items()}
            images = {name: each.image_column for name, each in settings.items()}
            return dataset_sequence(data, labels, images, **given)
        only = settings[ONLY]
        return KINDS[self.kind](data[ONLY], label_column=only.label_column, image_column=only.image_column, **given)


KINDS = {
    "class-incremental": class_incremental,
    "task-incremental": task_incremental,
    "domain-incremental": domain_incremental,
    SEQUENCE: dataset_sequence,
    "task-free": task_free,
}


def _arguments_of(kind: str) -> set[str]:
    names = set(inspect.signature(KINDS[kind]).parameters)
    # Those that are made of class_incremental pass the rest on to it.
    return names | set(inspect.signature(class_incremental).parameters) if "settings" in names else names


@dataclass(frozen=True)
class RunSettings:
    """A run, checked as far as it can be without its model and its data."""

    method_name: str
    method: Method
    preset: str | None
    adapter: PromptPoolConfig
    strategies: list[Strategy]
    continue_from: str | None
    model: ModelSettings
    processor: dict[str, Any]
    datasets: dict[str, DatasetSettings]
    scenario: ScenarioSettings
    augmentation: RandomResizedCropFlip | None
    training: ContinualTrainingArguments
    learning_rate_note: str
    output_dir: str


def make_settings(config: dict[str, Any], earlier: PromptPoolConfig | None = None) -> RunSettings:
    """Turn the sections of a configuration into settings.

    Args:
        config: The sections.
        earlier: Configuration of the adapter to continue from, which then says method and settings.

    Raises:
        CommandError: An unknown section or name, a value of another type or out of range, or a section that is
            missing; the message says which, the rule and the remedy.
    """
    for name in config:
        if name not in SECTIONS:
            raise _unknown_section(name)
    model = fill("model", ModelSettings, _expand(config.get("model"), "name"))
    method_name, method, preset, adapter = _make_adapter(config) if earlier is None else _take_over(config, earlier)
    if method.trains_backbone and model.dtype != "float32":
        raise CommandError(
            f"model.dtype is {model.dtype}, but {method_name} trains the backbone, whose small steps are lost in 16 "
            "bits. Set model.dtype to float32 (and training.bf16 to true, for speed on a GPU)."
        )
    output_dir = config.get("output_dir")
    if not isinstance(output_dir, str) or not output_dir:
        raise CommandError("output_dir is missing: it names the folder for adapter and results. Give one.")
    training, note = _make_arguments(config.get("training"), output_dir)
    scenario = fill("scenario", ScenarioSettings, config.get("scenario"))
    return RunSettings(
        method_name=method_name,
        method=method,
        preset=preset,
        adapter=adapter,
        strategies=[method.strategy_class(), *_make_strategies(config.get("strategy"))],
        continue_from=config.get("continue_from"),
        model=model,
        processor=check_names("processor", config.get("processor"), ImagesKwargs.__annotations__),
        datasets=_make_datasets(config.get("dataset"), scenario.kind),
        scenario=scenario,
        augmentation=_make_augmentation(config.get("augmentation")),
        training=training,
        learning_rate_note=note,
        output_dir=output_dir,
    )


def _unknown_section(name: str) -> CommandError:
    error = unknown("section", name, SECTIONS)
    owners = {
        "training": ContinualTrainingArguments.__dataclass_fields__,
        "dataset": DatasetSettings.__dataclass_fields__,
        "scenario": ScenarioSettings.__dataclass_fields__,
    }
    found = [section for section, names in owners.items() if name in names]
    # The commonest slip: a setting without its section.
    return CommandError(f"{error} {found[0]}.{name} exists: put it there.") if found else error


def _expand(values: Any, name: str) -> Any:
    return {name: values} if isinstance(values, str) else values


def _make_datasets(values: Any, kind: str) -> dict[str, DatasetSettings]:
    """The section `dataset`: one, or for a sequence of several a mapping of names to what else is the section."""
    if kind != SEQUENCE:
        return {ONLY: fill("dataset", DatasetSettings, _expand(values, "path"))}
    if not isinstance(values, dict) or not all(isinstance(each, (str, dict)) for each in values.values()):
        raise CommandError(
            f"dataset is {values!r}, but a {SEQUENCE} has several: a mapping such as `{{mnist: ylecun/mnist, svhn: "
            "{path: ufldl-stanford/svhn, name: cropped_digits}}`."
        )
    return {name: fill(f"dataset.{name}", DatasetSettings, _expand(each, "path")) for name, each in values.items()}


def _make_adapter(config: dict[str, Any]) -> tuple[str, Method, str | None, PromptPoolConfig]:
    name = config.get("method")
    if name is None:
        raise CommandError(f"method is missing. Give one of {', '.join(METHODS)}.")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method, preset = METHODS[name], config.get("preset")
    config_class = method.config_class
    if preset is not None and preset not in config_class.presets:
        raise unknown(f"preset of {name}", preset, config_class.presets)
    known = [setting for setting in config_class.__dataclass_fields__ if setting not in NOT_SETTINGS]
    values = check_names("adapter", config.get("adapter"), known)
    with explained("adapter is wrong"):
        return name, method, preset, method.configure(preset, **values)


def _take_over(config: dict[str, Any], earlier: PromptPoolConfig) -> tuple[str, Method, str | None, PromptPoolConfig]:
    given = [name for name in ("preset", "adapter") if config.get(name) is not None]
    if given:
        raise CommandError(
            f"continue_from takes the settings from the adapter, but {' and '.join(given)} are given too. Take them "
            f"out, for instance by {' '.join(f'--{name} null' for name in given)}."
        )
    fitting = [name for name, method in METHODS.items() if method.config_class is type(earlier)]
    name = config.get("method") or (fitting[0] if len(fitting) == 1 else None)
    if name not in fitting:
        raise CommandError(
            f"The adapter is one of {', '.join(fitting)}, and method is {name!r}. Set method to how it is to learn on."
        )
    return name, METHODS[name], None, earlier


def _make_strategies(values: Any) -> list[Strategy]:
    """The section `strategy`: a name, or a mapping of names and their settings."""
    strategies = []
    for name, settings in check_names("strategy", _expand(values, values) or {}, STRATEGIES).items():
        known = [each for each in inspect.signature(STRATEGIES[name]).parameters if each not in ("args", "kwargs")]
        given = check_names(f"strategy.{name}", None if settings == name else settings, known)
        with explained("strategy is wrong"):
            strategies.append(STRATEGIES[name](**given))
    return strategies


def _make_augmentation(values: Any) -> RandomResizedCropFlip | None:
    if values is None or values is False or values == "none":
        return None
    return fill("augmentation", RandomResizedCropFlip, values)


def _make_arguments(values: Any, output_dir: str) -> tuple[ContinualTrainingArguments, str]:
    """Returns the arguments, and how the learning rate came about."""
    values = check_names("training", values, _settable_arguments())
    values = {name: value for name, value in values.items() if value is not None}  # null: the default
    if SCALED_RATE in values and "learning_rate" in values:
        raise CommandError(
            f"training has both learning_rate ({values['learning_rate']}) and {SCALED_RATE} ({values[SCALED_RATE]}). "
            f"Keep one; on the command line `--training.{SCALED_RATE} null` takes the other out."
        )
    arguments = fill("training", ContinualTrainingArguments, values, output_dir=output_dir)
    if arguments.device.type == "cpu":
        arguments.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns of it
    note = f"{arguments.learning_rate:g}"
    if arguments.learning_rate_per_256 is not None:
        note += f" = {arguments.learning_rate_per_256:g} x {arguments.images_per_step} images in a step / 256"
    return arguments, note


def _settable_arguments() -> list[str]:
    known = ContinualTrainingArguments.__dataclass_fields__
    return [name for name in known if known[name].init and name != "output_dir"]
