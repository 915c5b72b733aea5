"""The sections of a configuration that say what a run works on: the backbone, the data, the scenario."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset

from ..scenarios import (
    Scenario,
    class_incremental,
    dataset_sequence,
    domain_incremental,
    task_free,
    task_incremental,
)


#: The kind of scenario that has several data sets, and the name of the one that all other kinds have.
SEQUENCE, ONLY = "dataset-sequence", ""
STREAM = "task-free"


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
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with model or processor. Only if you have read it."}
    )


@dataclass(frozen=True)
class DatasetSettings:
    """The section `dataset`, a text in its place is the path; or one of several by name, for a dataset-sequence."""

    path: str = field(
        metadata={"help": "Hub name, or a local folder: of images, of parquet files, or written by save_to_disk."}
    )
    name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set that has several."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub data set. null: the newest."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder within the data set whose files alone are read. null: all."}
    )
    data_files: str | list[str] | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Files that are read, as patterns: one, a list, or a mapping of splits to them."},
    )
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
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to choose by within a task (early stopping, the best checkpoint). null: none; or set "
            "training.validation_fraction."
        },
    )

    def __post_init__(self) -> None:
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}, but must lie between 0 and 1, such as 0.2.")
        if self.test_fraction is not None and self.test_split == self.train_split:  # the part held back has its name
            object.__setattr__(self, "test_split", f"{self.test_split}, held back")


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
    images_per_class: int | None = field(
        default=None,
        metadata={
            "help": "At most so many training images of each class in each task, drawn with seed (not task-free). "
            "null: all."
        },
    )

    def __post_init__(self) -> None:
        known = _arguments_of(self.kind) | (set() if self.kind == STREAM else {"images_per_class"})
        given = [name for name, value in vars(self).items() if name != "kind" and value is not None]
        foreign = [name for name in given if name not in known]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} does not go with the kind {self.kind}. Take it out, or set it to null."
            )
        if "num_tasks" in known and self.num_tasks is None and self.classes_per_task is None:
            raise ValueError("num_tasks is missing: the number of tasks that the classes are divided into. Give it.")
        for order in ("class_order", "domain_order"):
            if self.seed is not None and getattr(self, order) is not None:
                raise ValueError(f"seed {self.seed} and {order} both set the order. Give one of them.")

    def make(self, data: Mapping[str, tuple[Dataset, Dataset]], settings: Mapping[str, DatasetSettings]) -> Scenario:
        """Make the scenario from the training and test split of each data set and its settings."""
        scenario = self._make(data, settings)
        return (
            scenario
            if self.images_per_class is None
            else scenario.with_images_per_class(self.images_per_class, self.seed or 0)
        )

    def _make(self, data: Mapping[str, tuple[Dataset, Dataset]], settings: Mapping[str, DatasetSettings]) -> Scenario:
        own = ("kind", "images_per_class")
        given = {name: value for name, value in vars(self).items() if name not in own and value is not None}
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
    STREAM: task_free,
}


def _arguments_of(kind: str) -> set[str]:
    names = set(inspect.signature(KINDS[kind]).parameters)
    # Those that are made of class_incremental pass the rest on to it.
    return names | set(inspect.signature(class_incremental).parameters) if "settings" in names else names
