"""Held-out training images in the place of test images, and the first tasks of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..scenarios import Scenario
from ..scenarios.columns import read_labels
from ..trainer.choosing import share_of_each_class


def hold_out(train: Dataset, columns: Sequence[str], share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide training examples into those to learn from and those to judge by. No image is decoded or copied.

    Args:
        train: Training examples.
        columns: Columns of the classes, and of the domains where there are such: the share is one of each
            combination of their values.
        share: What part is held out, between 0 and 1: at least one of two examples, and never all.
        seed: Draws them.

    Raises:
        ValueError: A column is missing, or has no labels.

    Example:
        >>> data = Dataset.from_dict({"label": [0] * 10 + [1] * 5})
        >>> [len(part) for part in hold_out(data, ["label"], 0.2, seed=0)]
        [12, 3]
    """
    values = np.stack([read_labels(train, train, column).train for column in columns])
    _, group = np.unique(values, axis=1, return_inverse=True)
    drawn = share_of_each_class(group.ravel(), share, seed)
    return train.select(np.flatnonzero(~drawn)), train.select(np.flatnonzero(drawn))


def first_tasks(scenario: Scenario, count: int) -> Scenario:
    """The first tasks of a sequence, as they come in it.

    Args:
        scenario: The sequence, its test images the held-out ones.
        count: Number of tasks.

    Raises:
        ValueError: There are not as many, a stream would be cut, or a class has no image to judge by.
    """
    if not 1 <= count <= len(scenario):
        raise ValueError(
            f"--tasks is {count}, but must be from 1 to {len(scenario)}, the tasks of the scenario. Give one "
            f"such as {min(3, len(scenario))}."
        )
    if not scenario.boundaries and count < len(scenario):
        raise ValueError(
            f"--tasks is {count}, but the scenario is a stream, which has no first tasks: images of all classes may "
            f"come in it from the beginning. Give --tasks {len(scenario)}, the whole stream."
        )
    for task in scenario[:count]:
        measured = {scenario.classes[row] for row in np.unique(scenario.model_labels(task, "test"))}
        lacking = [name for name in task.classes if name not in measured]
        if lacking:
            raise ValueError(
                f"No image of {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''} in {task.name!r} can be "
                "held out: it is the only training image of its class. Add images, or leave the class out."
            )
    return scenario.changed(scenario[:count], data=None)
