"""The tasks of the images that an adapter is measured on: told by their classes, or by a column of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..scenarios.columns import read_labels
from .adapters import SavedAdapter
from .errors import CommandError, explained, some


BY_CLASS = "each of its classes belongs to one task"
STREAM = "it was learnt from a stream, which has no tasks"
SHARED_CLASSES = "its tasks share classes, so that a class does not say the task; give --domain-column"


@dataclass(frozen=True)
class ImageTasks:
    """The tasks of images.

    Attributes:
        numbers: The task of each image, int64, shape (images,), -1: none that the adapter has learnt.
        names: The tasks' names; none where the images cannot be divided into tasks, and all numbers are 0.
        missing: The reason then.
    """

    numbers: np.ndarray
    names: tuple[str, ...] = ()
    missing: str | None = None


def find_tasks(adapter: SavedAdapter, examples: Dataset, truth: np.ndarray, column: str | None) -> ImageTasks:
    """Find the tasks that images are of.

    Args:
        adapter: The adapter whose tasks they are.
        examples: The images.
        truth: Their rows of the adapter's head, -1 for classes that it has not learnt.
        column: The column of the data that says the task, where the class does not.

    Raises:
        CommandError: The column is not needed, not there, or has none of the adapter's domains.
    """
    rows = [row for task in adapter.config.tasks for row in task]
    if adapter.config.stream:
        rule = STREAM
    elif adapter.scenario == "domain-incremental" or len(set(rows)) < len(rows):
        rule = SHARED_CLASSES
    else:
        rule = BY_CLASS
    if column is not None:
        if rule != SHARED_CLASSES:
            raise CommandError(
                f"--domain-column is {column!r}, but the adapter does not need it: {rule}. Leave it out."
            )
        return _by_column(adapter, examples, truth, column)
    return _by_class(adapter, truth) if rule == BY_CLASS else ImageTasks(np.zeros_like(truth), missing=rule)


def sequence_of(adapter: SavedAdapter) -> tuple[str, ...]:
    """The tasks of a sequence of data sets whose classes bear the data set's name; none of another adapter."""
    named = adapter.results.task_names if adapter.scenario == "dataset-sequence" else ()
    return tuple(name for name in named if _of(name, adapter.config.classes))


def names_of_classes(adapter: SavedAdapter, names: Sequence[str], task: str | None) -> list[str]:
    """Return what the adapter calls classes of these names, in the data set that was its `task` (None: the names).

    Raises:
        CommandError: It has no classes that bear that name.
    """
    if task is None:
        return list(names)
    if not _of(task, adapter.config.classes):
        known = sequence_of(adapter)
        remedy = f"Give one of {', '.join(known)}." if known else "Leave it out."
        raise CommandError(
            f"--task is {task!r}, but no class of the adapter bears that name ({some(adapter.config.classes)}). "
            f"{remedy}"
        )
    return [f"{task}/{name}" for name in names]


def task_of_rows(adapter: SavedAdapter) -> np.ndarray:
    """Return the task of each row of the head, where each has one; the last entry, -1, is for a class not learnt."""
    task_of_row = np.full(len(adapter.config.classes) + 1, -1)
    for number, rows in enumerate(adapter.config.tasks):
        task_of_row[rows] = number
    return task_of_row


def _of(task: str, classes: Sequence[str]) -> bool:
    return any(name.startswith(f"{task}/") for name in classes)


def _by_class(adapter: SavedAdapter, truth: np.ndarray) -> ImageTasks:
    names = adapter.names_of_tasks
    return ImageTasks(task_of_rows(adapter)[truth], names)


def _by_column(adapter: SavedAdapter, examples: Dataset, truth: np.ndarray, column: str) -> ImageTasks:
    """By the values that are on record as the adapter's domains, or else by all values."""
    if column not in examples.column_names:
        raise CommandError(
            f"--domain-column is {column!r}, but the data has the columns {examples.column_names}. Give one of them."
        )
    with explained(f"--domain-column is {column!r}, which cannot be used"):
        values = read_labels(examples, examples, column)
    learnt = adapter.task_names if adapter.scenario == "domain-incremental" else None
    names = learnt or values.trained()
    numbers = np.array([names.index(name) if name in names else -1 for name in values.names])[values.test]
    if not (numbers[truth >= 0] >= 0).any():
        raise CommandError(
            f"--domain-column is {column!r}, but no image there is of a domain that the adapter has learnt "
            f"({some(names)}); its values are {some(values.trained())}. Give another column or data set."
        )
    return ImageTasks(numbers, names)
