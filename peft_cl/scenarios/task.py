"""A task and a sequence of tasks: what every scenario hands to the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from datasets import Dataset


@dataclass(frozen=True)
class Task:
    """One step of a task sequence.

    Attributes:
        index: Position in the sequence, from 0.
        name: Name in logs and tables, `"task_0"` by default of the scenarios.
        classes: Names of the classes of this task, in the scenario's class order.
        train: Training examples, a `select` view of the user's data set (no image is copied).
        test: Test examples of the same classes, a view likewise.
    """

    index: int
    name: str
    classes: tuple[str, ...]
    train: Dataset
    test: Dataset

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

    Raises:
        ValueError: No tasks, indices out of order, or a class that is not in `label_names`.

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
    ) -> None:
        self._tasks = tuple(tasks)
        self.name = name
        self.image_column = image_column
        self.label_column = label_column
        self.label_names = tuple(label_names)
        self.seed = seed
        self.task_known = task_known
        if not self._tasks:
            raise ValueError(f"The scenario {name!r} has no tasks; a sequence needs at least one.")
        indices = [task.index for task in self._tasks]
        if indices != list(range(len(indices))):
            raise ValueError(f"Task indices must be 0, 1, 2, ... in order, got {indices}; number the tasks anew.")
        # A class may come back in a later task (domain-incremental): the first appearance fixes its place.
        self.classes: tuple[str, ...] = tuple(dict.fromkeys(name for task in self._tasks for name in task.classes))
        unknown = [name for name in self.classes if name not in set(self.label_names)]
        if unknown:
            raise ValueError(
                f"The tasks' classes {unknown} are not in label_names {list(self.label_names)}; "
                "give every class the name that its label has in the data set."
            )

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

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the sequence, in types that JSON knows (it goes into `results.json`).

        Returns:
            `name`, `num_tasks`, `seed`, `class_order` (all classes), and one entry per task in `task_names`,
            `classes_per_task` (counts), `train_sizes` and `test_sizes` (numbers of examples).
        """
        return {
            "name": self.name,
            "num_tasks": len(self),
            "seed": self.seed,
            "class_order": list(self.classes),
            "task_names": [task.name for task in self],
            "classes_per_task": [len(task.classes) for task in self],
            "train_sizes": [len(task.train) for task in self],
            "test_sizes": [len(task.test) for task in self],
        }
