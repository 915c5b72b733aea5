"""Class-incremental learning: every task brings new classes, and the test never says from which task an image is."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from .columns import Labels, is_count, is_list, read_labels
from .order import drawn_order, given_order
from .overlap import splits_with_images
from .task import Scenario, Task


def class_incremental(
    dataset: Mapping[str, Dataset] | tuple[Dataset, Dataset],
    num_tasks: int | None = None,
    label_column: str = "label",
    *,
    classes_per_task: Sequence[int] | None = None,
    first_task_classes: int | None = None,
    image_column: str | None = None,
    class_order: Sequence[str] | Sequence[int] | None = None,
    seed: int | None = None,
    train_split: str = "train",
    test_split: str = "test",
) -> Scenario:
    """Divides the classes of a data set into a sequence of tasks (class-incremental learning, van de Ven et al. 2022).

    No image is decoded or copied: the labels are read once and each task is a `select` view. If the classes do not
    divide evenly, the first tasks have one class more (10 classes in 4 tasks: 3, 3, 2, 2).

    Args:
        dataset: A `DatasetDict` (or dict) with a train and a test split, or a pair (train, test).
        num_tasks: Number of tasks, from 1 to the number of classes; `None` with `classes_per_task`.
        label_column: A `ClassLabel`, integer (the name of a class is `str(label)`) or string column.
        classes_per_task: Number of classes of each task, in place of `num_tasks`; classes beyond their sum are left
            out.
        first_task_classes: Number of classes of the first task, where it is to be larger; the other `num_tasks - 1`
            tasks divide the rest.
        image_column: Column of the images; `None`: the only one with an `Image` feature.
        class_order: Class names or label ids in the order wanted, without repeats; a subset leaves the rest out.
            `None`: the order of the label ids, or drawn from `seed`.
        seed: Draws the order, `numpy.random.default_rng(seed).permutation`; not together with `class_order`.
        train_split: Name of the split to train on, for a dict of splits.
        test_split: Name of the split to test on, for a dict of splits.

    Returns:
        The scenario, named `"class-incremental"`, its tasks `"task_0"`, `"task_1"`, ...

    Raises:
        ValueError: A missing split or column, one split to train and to test on, labels that are missing or outside
            the names, different names in train and test, fewer classes than tasks, a class order with unknown,
            repeated or untrained classes or together with a seed, a seed below 0, or a task without examples. The
            message names the remedy.
        TypeError: `dataset` is no train and test split, or is streamed.

    Warns:
        UserWarning: `ClassLabel` names without a training example are left out (with `class_order`: an error).

    Example:
        >>> scenario = class_incremental(load_dataset("uoft-cs/cifar100"), 10, "fine_label", seed=0)
        >>> [len(task.train) for task in scenario][:3]
        [5000, 5000, 5000]
        >>> larger = class_incremental(load_dataset("uoft-cs/cifar100"), 6, "fine_label", first_task_classes=50)
        >>> [len(task.classes) for task in larger]
        [50, 10, 10, 10, 10, 10]
    """
    _check_sizes(num_tasks, classes_per_task, first_task_classes)
    if class_order is not None and seed is not None:
        raise ValueError(f"class_order and seed={seed} both set the order of the classes; give only one of them.")
    train, test, image_column = splits_with_images(dataset, train_split, test_split, image_column)
    labels = read_labels(train, test, label_column)
    order = _order_of_classes(labels, class_order, seed)
    parts = _divide(order, num_tasks, classes_per_task, first_task_classes)
    task_of_label = np.full(len(labels.names), -1, dtype=np.int64)
    for index, part in enumerate(parts):
        task_of_label[part] = index
    task_of_train, task_of_test = task_of_label[labels.train], task_of_label[labels.test]

    tasks = []
    for index, part in enumerate(parts):
        classes = tuple(labels.names[label] for label in part)
        rows = np.flatnonzero(task_of_test == index)
        if not rows.size:
            raise ValueError(
                f"Task {index} with the classes {list(classes)} has no test examples, so its accuracy cannot be "
                "measured; leave these classes out by class_order=, use fewer tasks, or another test_split."
            )
        # Every class of the order has training examples (_order_of_classes), hence every task.
        view = train.select(np.flatnonzero(task_of_train == index))
        tasks.append(Task(index=index, name=f"task_{index}", classes=classes, train=view, test=test.select(rows)))
    return Scenario(
        tasks,
        name="class-incremental",
        image_column=image_column,
        label_column=label_column,
        label_names=labels.names,
        seed=seed,
        data=(train, test),
    )


def check_settings(function: Callable, settings: Mapping[str, Any]) -> None:
    """Refuses, in the name of a function that passes `settings` on to `class_incremental`, what neither knows."""
    own, passed_on = (inspect.signature(each).parameters for each in (function, class_incremental))
    unknown = [name for name in settings if name not in passed_on]
    if unknown:
        known = dict.fromkeys(name for name in (*own, *passed_on) if name != "settings")
        raise TypeError(
            f"{function.__name__}() got {', '.join(unknown)}, but its arguments are {', '.join(known)}. Correct the "
            "name, or leave it out."
        )


def _check_sizes(
    num_tasks: int | None, classes_per_task: Sequence[int] | None, first_task_classes: int | None
) -> None:
    if classes_per_task is not None:
        if num_tasks is not None or first_task_classes is not None:
            raise ValueError(
                "classes_per_task sets the size of every task; leave num_tasks and first_task_classes out, or it."
            )
        if not is_list(classes_per_task) or not len(classes_per_task) or not all(map(is_count, classes_per_task)):
            raise ValueError(
                f"classes_per_task is {classes_per_task!r}, but must be a list of whole numbers of at least 1, one "
                "for each task. For tasks of equal size give num_tasks= in its place."
            )
    elif not is_count(num_tasks):
        raise ValueError(
            f"num_tasks must be a whole number of at least 1, got {num_tasks!r}; give the number of tasks that the "
            "classes make, or classes_per_task= in its place."
        )
    elif first_task_classes is not None and not (is_count(first_task_classes) and num_tasks > 1):
        raise ValueError(
            f"first_task_classes is {first_task_classes!r} with num_tasks={num_tasks}, but must be a whole number "
            "of at least 1, followed by at least one more task."
        )


def _divide(
    order: np.ndarray, num_tasks: int | None, classes_per_task: Sequence[int] | None, first_task_classes: int | None
) -> list[np.ndarray]:
    """Returns the label ids of each task."""
    if classes_per_task is not None:
        ends = np.cumsum(classes_per_task)
        if ends[-1] > len(order):
            raise ValueError(
                f"classes_per_task asks for {ends[-1]} classes, but there are {len(order)}; give smaller numbers."
            )
        return np.split(order[: ends[-1]], ends[:-1])
    first, others = ([order[:first_task_classes]], order[first_task_classes:]) if first_task_classes else ([], order)
    if len(others) < num_tasks - len(first):
        raise ValueError(
            f"{len(order)} classes cannot make {num_tasks} tasks"
            + (f" with {first_task_classes} in the first" if first else "")
            + ", every task needs at least one class; give fewer tasks, or more classes."
        )
    # np.array_split gives the first parts one more, which is the rule documented above.
    return [*first, *np.array_split(others, num_tasks - len(first))]


def _order_of_classes(
    labels: Labels, class_order: Sequence[str] | Sequence[int] | None, seed: int | None
) -> np.ndarray:
    """Returns the label ids in the order of the sequence, int64; each has at least one training example."""
    trained = np.bincount(labels.train, minlength=len(labels.names)) > 0
    if class_order is not None:
        return given_order(class_order, labels.names, trained, "class_order", "class")
    if labels.declared and not trained.all():
        unused = [labels.names[label] for label in np.flatnonzero(~trained)]
        warnings.warn(
            f"The classes {unused} have no training examples and are left out of the tasks, their test examples with "
            "them; name the classes to use by class_order= to say so yourself.",
            stacklevel=3,
        )
    return drawn_order(np.flatnonzero(trained), seed)
