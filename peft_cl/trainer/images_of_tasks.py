"""Images that are given beside the scenario (of tasks learnt before, or to choose by), divided among the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..scenarios import Scenario, Task
from ..scenarios.columns import find_image_column, read_label_ids, read_labels, require_examples


@dataclass(frozen=True)
class _Part:
    """Images, and what is in their columns; `names` of the label ids are None where the data says them itself."""

    images: Dataset
    image_column: str | None
    label_column: str
    names: tuple[str, ...] | None = None
    prefix: str = ""


def images_of_tasks(
    argument: str, data: Any, names: Sequence[str], classes: Sequence[Sequence[str]], like: Scenario, first: int = 0
) -> list[Task]:
    """The tasks that `data` has images of, in order; the images are their `test`.

    Args:
        argument: name of the user's argument, for messages.
        data: a `Dataset`, whose images go to the task that has their class; a dict of them by the task's name; or a
            `Scenario`, whose test images count. Images of other classes are left out.
        names, classes: the tasks' names, and the names of their classes.
        like: the scenario whose columns the images have from now on. The labels of data that is no scenario are in
            its label column.
        first: index of the first task.

    Raises:
        ValueError, TypeError: no data, unknown tasks, tasks that a class does not tell apart, missing columns, or no
            image of a task that is named.
    """
    parts = _parts(argument, data, names, classes, like)
    found = []
    for number, (name, own) in enumerate(zip(names, classes, strict=True)):
        if name not in parts:
            continue
        try:
            task = _task(parts[name], number + first, name, tuple(own), like)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{argument}, task {name!r}: {error}") from error
        if len(task.test):
            found.append(task)
        elif isinstance(data, Mapping):
            raise ValueError(
                f"{argument} has data for the task {name!r}, but no image of its classes ({', '.join(own[:5])}). Give "
                "the task's own images, or leave the task out."
            )
    if not found:
        raise ValueError(
            f"{argument} has no image of the tasks {', '.join(names)}. Give images of their classes, or leave "
            f"{argument} out."
        )
    return found


def _parts(
    argument: str, data: Any, names: Sequence[str], classes: Sequence[Sequence[str]], like: Scenario
) -> dict[str, _Part]:
    """For each task that there is data for, the data that its images are in."""
    if isinstance(data, Scenario):
        known = dict(zip(names, map(set, classes), strict=True))
        return {
            name: _Part(
                task.test,
                data.image_column,
                data.label_column,
                task.label_names or data.label_names,
                task.label_prefix,
            )
            for task in data
            for name in [_same_task(task, known)]
            if name is not None
        }
    if isinstance(data, Mapping):
        unknown = [name for name in data if name not in names]
        if unknown:
            raise ValueError(
                f"{argument} names {', '.join(map(repr, unknown))}, but the tasks are {', '.join(names)}. Give "
                "{name of a task: its images}, or one data set with the images of all of them."
            )
        return {name: _Part(part, None, like.label_column) for name, part in data.items()}
    if not isinstance(data, Dataset):
        raise TypeError(
            f"{argument} is a {type(data).__name__}, but must be a datasets.Dataset (one split), a dict of them by "
            "the name of the task, or a scenario. Load one split with load_dataset(..., split='test')."
        )
    every = [name for own in classes for name in own]
    if len(set(every)) < len(every):
        raise ValueError(
            f"{argument} is one data set, but the tasks {', '.join(names)} share classes, so that a class does not "
            "say the task. Give {name of a task: its images}."
        )
    return dict.fromkeys(names, _Part(data, None, like.label_column))


def _same_task(task: Task, known: Mapping[str, set[str]]) -> str | None:
    """The name under which a task of another scenario is known: by its classes, and by its name where they recur."""
    alike = [name for name, classes in known.items() if classes == set(task.classes)]
    return task.name if task.name in alike else alike[0] if len(alike) == 1 else None


def _task(part: _Part, index: int, name: str, classes: tuple[str, ...], like: Scenario) -> Task:
    """A task of the images of its classes in `part`, under the columns of `like`."""
    images, names, prefix = part.images, part.names, part.prefix
    require_examples(images, "test")
    if part.label_column not in images.column_names:
        raise ValueError(
            f"There is no column {part.label_column!r} in the data; its columns are {images.column_names}. Call "
            f"rename_column on it, so that its labels are in {part.label_column!r}."
        )
    image_column = find_image_column(images, images, part.image_column)
    if names is None:
        labels = read_labels(images, images, part.label_column)
        names, ids = labels.names, labels.test
        # In a sequence of data sets a class bears the name of its own.
        prefix = f"{name}/" if all(each.startswith(f"{name}/") for each in classes) else ""
    else:
        ids = read_label_ids(images, part.label_column, names, "test")
    wanted = np.array([prefix + each in classes for each in names], dtype=bool)
    columns = {image_column: like.image_column, part.label_column: like.label_column}
    view = images.select(np.flatnonzero(wanted[ids]))
    if images.format["type"] != "custom":  # a transform of the user's may need other columns
        view = view.select_columns(list(columns))
    view = view.rename_columns({old: new for old, new in columns.items() if old != new})
    return Task(index, name, classes, view, view, names, prefix)
