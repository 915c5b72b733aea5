"""A task and a sequence of tasks: what every scenario hands to the trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
from datasets import Dataset

from .columns import (
    check_flag,
    check_name,
    check_seed,
    is_count,
    read_label_ids,
    refuse_ready_pixels,
    require_column,
    require_examples,
)
from .overlap import digest_of_images, whole_data


@dataclass(frozen=True)
class Task:
    """One step of a task sequence.

    Attributes:
        index: Position in the sequence, from 0.
        name: Name in logs and tables, `"task_0"` by default of the scenarios.
        classes: Names of the classes of this task, in the scenario's class order.
        train: Training examples, a `select` view of the user's data set (no image is copied).
        test: Test examples of the same classes, a view likewise.
        label_names: Name of each label id in this task's data; `None`: the scenario's.
        label_prefix: What makes a class name of such a name, put in front of it.
    """

    index: int
    name: str
    classes: tuple[str, ...]
    train: Dataset
    test: Dataset
    label_names: tuple[str, ...] | None = None
    label_prefix: str = ""

    def __repr__(self) -> str:
        return (
            f"Task({self.index}, {self.name!r}, {len(self.classes)} classes, "
            f"{len(self.train)} train, {len(self.test)} test examples)"
        )


class Scenario(Sequence[Task]):
    """A sequence of tasks over one set of classes; iterable, with `len()` and `[i]`.

    The labels in the tasks' data stay the data set's own. `label_index` leads from them to the order in which the
    classes first appear, which is the order of the model's outputs: so a head only ever grows at its end.

    Args:
        tasks: The tasks, in order; `tasks[i].index` must be `i`.
        name: Kind of the sequence, for example `"class-incremental"`.
        image_column: Column of the images in every task's data.
        label_column: Column of the labels in every task's data.
        label_names: Class name of each label id of the data set; a string label is its own name.
        seed: Seed of the class order, `None` if it was not drawn.
        task_known: Whether a test image comes with the number of its task, so that only its classes are in question.
        boundaries: Whether tasks are learnt as such. Without, they are the stretches of one stream, which is learnt in
            the order of the data, and measured after each stretch.
        settings: What else made the sequence what it is, in types that JSON knows.
        data: The splits that the tasks are made of, where they hold more than the tasks do; `None`: the tasks' own.

    Raises:
        ValueError: No tasks, indices out of order, a task's name twice or no text, a class that is not in the label
            names, or a task without classes, with a class twice, without examples or a column, or with examples of
            other classes; a `name` that is no text, or a `task_known` or `boundaries` that is not True or False.
        TypeError: Something else than tasks, or a split that is streamed.

    Example:
        >>> scenario = class_incremental(load_dataset("uoft-cs/cifar100"), num_tasks=10, label_column="fine_label")
        >>> len(scenario), scenario[0].classes[:2], scenario.label_index().shape
        (10, ('apple', 'aquarium_fish'), (100,))
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        *,
        name: str,
        image_column: str,
        label_column: str,
        label_names: Sequence[str],
        seed: int | None = None,
        task_known: bool = False,
        boundaries: bool = True,
        settings: Mapping[str, Any] | None = None,
        data: Sequence[Dataset] | None = None,
    ) -> None:
        self._tasks = tuple(tasks) if isinstance(tasks, Iterable) else (tasks,)
        others = [task for task in self._tasks if not isinstance(task, Task)]
        if others:
            raise TypeError(
                f"tasks has {others[0]!r}, but a scenario is made of a list of Task; make one from a data set by "
                "class_incremental() or another of the functions."
            )
        self.name = check_name("The scenario's name", name)
        self.image_column = image_column
        self.label_column = label_column
        self.label_names = tuple(label_names)
        self.seed = None if seed is None else check_seed("seed", seed)
        self.task_known = check_flag("task_known", task_known)
        self.boundaries = check_flag("boundaries", boundaries)
        self.settings = dict(settings or {})
        self.data = None if data is None else tuple(data)
        if not self._tasks:
            raise ValueError(f"The scenario {name!r} has no tasks; give at least one.")
        indices = [task.index for task in self._tasks]
        if indices != list(range(len(indices))):
            raise ValueError(f"Task indices must be 0, 1, 2, ... in order, got {indices}; number the tasks anew.")
        names = [check_name(f"The name of task {task.index}", task.name) for task in self._tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"Task names must differ, as results are kept by them, got {names}; name the tasks anew.")
        # A class may come back in a later task (domain-incremental): the first appearance fixes its place.
        self.classes: tuple[str, ...] = tuple(dict.fromkeys(name for task in self._tasks for name in task.classes))
        for task in self._tasks:
            try:
                self._check_classes(task)
                self._check_data(task)
            except (ValueError, TypeError) as error:
                raise type(error)(f"Task {task.name!r}: {error}") from error

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Task, ...]: ...

    def __getitem__(self, index: int | slice) -> Task | tuple[Task, ...]:
        return self._tasks[index]

    def __repr__(self) -> str:
        return f"Scenario({self.name!r}, {len(self)} tasks, {len(self.classes)} classes, seed={self.seed})"

    def _names(self, task: Task) -> tuple[str, ...]:
        return task.label_names or self.label_names

    def _check_classes(self, task: Task) -> None:
        if not task.classes or len(set(task.classes)) < len(task.classes):
            raise ValueError(
                f"classes is {task.classes!r}, but must be at least one name, and none twice. Give the names of the "
                "classes that its examples have, each once."
            )
        known = {task.label_prefix + name for name in self._names(task)}
        unknown = [name for name in task.classes if name not in known]
        if unknown:
            raise ValueError(
                f"The classes {unknown} are not in its label_names {sorted(known)}; "
                "give every class the name that its label has in the data set."
            )

    def _check_data(self, task: Task) -> None:
        splits = {"train": task.train, "test": task.test}
        for split, examples in splits.items():
            require_examples(examples, split)
        require_column(splits, self.label_column, "label_column")
        # A transform that the user has set may make the images of other columns.
        stored = {split: examples for split, examples in splits.items() if examples.format["type"] != "custom"}
        require_column(stored, self.image_column, "image_column")
        names = self._names(task)
        for split, examples in splits.items():
            refuse_ready_pixels(examples, self.image_column, split)
            # In a stretch of a stream images of all its classes come; it is measured on its own.
            whole = split == "train" and not self.boundaries
            classes = set(self.classes if whole else task.classes)
            found = np.unique(read_label_ids(examples, self.label_column, names, split))
            foreign = [name for name in (task.label_prefix + names[label] for label in found) if name not in classes]
            if foreign:
                raise ValueError(
                    f"The {split} split has examples of {foreign[:10]}, which are not among the classes of "
                    f"the {'stream' if whole else 'task'}. Add them to its classes, or remove them by filter()."
                )

    def label_index(self, known: Sequence[str] = ()) -> np.ndarray:
        """Returns the model's label of each of the data set's label ids.

        Args:
            known: Classes that the model has learnt before, in the order of its outputs.

        Returns:
            int64 array of shape (len(label_names),): position in `known` followed by what is new in `classes`, -1 for
            classes left out.
        """
        position = {name: index for index, name in enumerate(dict.fromkeys([*known, *self.classes]))}
        return np.array([position.get(name, -1) for name in self.label_names], dtype=np.int64)

    def model_labels(self, task: Task, split: str, known: Sequence[str] = ()) -> np.ndarray:
        """Returns the model's labels of the examples of a task.

        Args:
            task: A task of the scenario, or one made of it with fewer examples.
            split: `"train"` or `"test"`.
            known: Classes that the model has learnt before, as for `label_index`.

        Returns:
            int64 array of shape (examples,).
        """
        names = self._names(task)
        position = {name: index for index, name in enumerate(dict.fromkeys([*known, *self.classes]))}
        labels = np.array([position.get(task.label_prefix + name, -1) for name in names], dtype=np.int64)
        return labels[read_label_ids(getattr(task, split), self.label_column, names, split)]

    def with_task(
        self,
        dataset: Mapping[str, Dataset] | tuple[Dataset, Dataset],
        *,
        name: str | None = None,
        label_column: str | None = None,
        image_column: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
    ) -> Scenario:
        """Returns the scenario with another data set as its next task.

        Args:
            dataset: A `DatasetDict` (or dict) with a train and a test split, or a pair (train, test).
            name: Name of the task; `None`: `"task_<index>"`.
            label_column: Column of its labels; `None`: the scenario's. Class names are what counts: a name that the
                scenario has already is the same class.
            image_column: Column of its images; `None`: the only one with an `Image` feature.
            train_split, test_split: Names of the splits, for a dict of splits.

        Raises:
            ValueError, TypeError: As `class_incremental` does for such data.
        """
        if not self.boundaries:
            raise ValueError(
                f"The scenario {self.name!r} is one stream, to which no task can be added. Make a class_incremental "
                "scenario of the data, or a new stream with all images."
            )
        labels, train, test = whole_data(
            dataset,
            label_column or self.label_column,
            image_column,
            (self.image_column, self.label_column),
            train_split,
            test_split,
        )
        numbers = not labels.declared and all(name.isdigit() for name in labels.names)
        if numbers and set(labels.names) & set(self.classes):
            warnings.warn(
                "The classes of the added data are numbers without names, and some are numbers of earlier classes: "
                "they are taken for the same classes. Cast the label column to a ClassLabel with other names if not.",
                stacklevel=2,
            )
        name = f"task_{len(self)}" if name is None else name
        task = Task(len(self), name, labels.trained(), train, test, labels.names)
        return self.changed([*self, task], data=None)

    def with_images_per_class(self, count: int, seed: int = 0) -> Scenario:
        """Returns the scenario with at most so many training images of each class in each task.

        For quick trials, and for learning from few images. Test images stay as they are.

        Args:
            count: Number of training images of each class in each task, at least 1. Of a class with fewer, all stay.
            seed: Draws them, `numpy.random.default_rng((seed, task))`.

        Raises:
            ValueError: `count` or `seed` is no such number, or the scenario is one stream.

        Example:
            >>> few = class_incremental(load_dataset("uoft-cs/cifar100"), 10, "fine_label").with_images_per_class(5)
            >>> [len(task.train) for task in few][:3]
            [50, 50, 50]
        """
        if not is_count(count):
            raise ValueError(
                f"images_per_class is {count!r}, but must be a whole number of at least 1; leave it out for "
                "all images."
            )
        if not self.boundaries:
            raise ValueError(
                f"images_per_class is {count}, but the scenario {self.name!r} is one stream, in which an image may "
                "come several times. Leave it out, or make the stream of fewer images."
            )
        seed = check_seed("seed", seed)
        tasks = []
        for task in self:
            labels = self.model_labels(task, "train")
            order = np.random.default_rng((seed, task.index)).permutation(len(labels))
            kept = np.sort(np.concatenate([order[labels[order] == label][:count] for label in np.unique(labels)]))
            tasks.append(replace(task, train=task.train.select(kept)))
        return self.changed(tasks, settings={**self.settings, "images_per_class": count, "images_seed": seed})

    def changed(self, tasks: Iterable[Task], **changes: Any) -> Scenario:
        """Returns a scenario of these tasks which is like this one but for `changes`, as `Scenario` takes them."""
        same = ("name", "image_column", "label_column", "label_names", "seed", "task_known", "boundaries", "settings")
        same = (*same, "data")
        return Scenario(tasks, **{**{name: getattr(self, name) for name in same}, **changes})

    @cached_property
    def content(self) -> str | None:
        """A digest of all images of the data, the same for any order of them; `None` where they are not stored."""
        parts = self.data or [getattr(task, split) for task in self for split in ("train", "test")]
        return digest_of_images(parts, self.image_column)

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the sequence, in types that JSON knows (it goes into `results.json`).

        Returns:
            `name`, `num_tasks`, `boundaries`, `settings`, `seed`, `class_order` (all classes), and one entry per task
            in `task_names`, `classes_per_task` (counts), `train_sizes` and `test_sizes` (numbers of examples).
        """
        return {
            "name": self.name,
            "num_tasks": len(self),
            "boundaries": self.boundaries,
            "settings": self.settings,
            "seed": self.seed,
            "class_order": list(self.classes),
            "task_names": [task.name for task in self],
            "classes_per_task": [len(task.classes) for task in self],
            "train_sizes": [len(task.train) for task in self],
            "test_sizes": [len(task.test) for task in self],
        }
