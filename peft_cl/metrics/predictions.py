"""From the predictions of a run to its accuracy matrix, and to what only single predictions tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def accuracy_matrix(
    predictions: ArrayLike, references: ArrayLike, task_ids: ArrayLike, steps: ArrayLike
) -> np.ndarray:
    """Accuracies of each task after each step.

    Args:
        predictions: Predicted class of each test example at each time it was measured, shape (N,).
        references: Its true class, (N,).
        task_ids: The task that it belongs to, from 0, (N,).
        steps: The task that was learnt last when it was measured, from 0, (N,).

    Returns:
        (T, T): `R[i, j]`, accuracy on task j after task i; NaN where nothing was measured. T is one more than the
        largest task or step.

    Raises:
        ValueError: No examples, arrays of different lengths, or numbers that are not whole, such as scores.

    Example:
        >>> accuracy_matrix([1, 1, 0, 2], [1, 0, 0, 2], task_ids=[0, 0, 0, 1], steps=[0, 0, 1, 1])
        array([[0.5, nan],
               [1. , 1. ]])
    """
    predicted, true, tasks, after = _checked(
        predictions=predictions, references=references, task_ids=task_ids, steps=steps
    )
    count = int(max(tasks.max(), after.max())) + 1
    correct, measured = np.zeros((count, count)), np.zeros((count, count))
    np.add.at(correct, (after, tasks), predicted == true)
    np.add.at(measured, (after, tasks), 1)
    return np.divide(correct, measured, out=np.full((count, count), np.nan), where=measured > 0)


def task_identification_accuracy(
    predictions: ArrayLike, task_ids: ArrayLike, task_of_class: Mapping[int, int] | ArrayLike
) -> float:
    """Share of examples whose predicted class is one of their own task's.

    Args:
        predictions: Predicted classes, (N,).
        task_ids: True tasks, (N,).
        task_of_class: Task of each class, for classes that belong to one task.

    Raises:
        ValueError: No examples, arrays of different lengths, or a predicted class that `task_of_class` lacks.

    Example:
        >>> task_identification_accuracy([0, 3, 1], [0, 0, 0], task_of_class=[0, 0, 1, 1])
        0.6666666666666666
    """
    predicted, tasks = _checked(predictions=predictions, task_ids=task_ids)
    task_of = {}
    for label in np.unique(predicted).tolist():
        try:
            task_of[label] = task_of_class[label]
        except (LookupError, TypeError) as error:  # TypeError: neither list nor dict
            raise ValueError(
                f"task_of_class has no entry for the class {label}, which is among the predictions; give the task of "
                "every class, as a list or as a dict with the classes' numbers as keys."
            ) from error
    return float(np.mean([task_of[label] == task for label, task in zip(predicted, tasks, strict=True)]))


def class_accuracies(predictions: ArrayLike, references: ArrayLike) -> dict[int, float]:
    """Accuracy on the examples of each class that has some.

    Args:
        predictions: Predicted classes, (N,).
        references: True classes, (N,).

    Raises:
        ValueError: No examples, or arrays of different lengths.

    Example:
        >>> class_accuracies([0, 1, 1], [0, 0, 1])
        {0: 0.5, 1: 1.0}
    """
    predicted, true = _checked(predictions=predictions, references=references)
    return {int(label): float((predicted == true)[true == label].mean()) for label in np.unique(true)}


def evaluation_details(
    predictions: ArrayLike,
    references: ArrayLike,
    task_ids: ArrayLike,
    classes: Sequence[str],
    tasks: Sequence[Sequence[str]] | None,
) -> dict[str, Any]:
    """What the record of a run holds of its last evaluation beside the accuracies of tasks.

    Args:
        predictions, references: Predicted and true class of each test example, (N,), as numbers of `classes`.
        task_ids: The task that it belongs to, (N,).
        classes: Name of each class.
        tasks: Names of each task's classes. `None`: a class does not say its task, or nobody has to find it out.

    Returns:
        `per_class_accuracy` (name -> accuracy, of classes with examples), and with `tasks` `task_identification`.

    Example:
        >>> evaluation_details([0, 1, 1], [0, 0, 1], [0, 0, 1], ["ant", "bee"], [["ant"], ["bee"]])
        {'per_class_accuracy': {'ant': 0.5, 'bee': 1.0}, 'task_identification': 0.6666666666666666}
    """
    found = class_accuracies(predictions, references)
    details: dict[str, Any] = {"per_class_accuracy": {classes[label]: value for label, value in found.items()}}
    if tasks is not None:
        task_of = {name: number for number, names in enumerate(tasks) for name in names}
        # A class that the model had learnt before is of none of these tasks.
        of_classes = [task_of.get(name, -1) for name in classes]
        details["task_identification"] = task_identification_accuracy(predictions, task_ids, of_classes)
    return details


def _checked(**columns: ArrayLike) -> list[np.ndarray]:
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(array.ndim != 1 or not array.size for array in arrays.values()):
        raise ValueError(
            f"One number per example is needed in each, but the shapes are {shapes}. Give as many of each."
        )
    return [_whole(name, array) for name, array in arrays.items()]


def _whole(name: str, array: np.ndarray) -> np.ndarray:
    wrong = array
    if array.dtype.kind in "iuf":  # whole floats such as 1.0 are taken
        wrong = array[~(np.isfinite(array) & (array >= 0) & (array == np.floor(array)))]
    if wrong.size:
        raise ValueError(
            f"{name} must be whole numbers from 0, got {wrong[0]!s}; give the numbers of classes, tasks or steps, and "
            "no scores."
        )
    return array.astype(int)
