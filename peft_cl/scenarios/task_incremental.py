"""Task-incremental learning: every task brings new classes, and the test says from which task an image is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .class_incremental import check_settings, class_incremental
from .task import Scenario


def task_incremental(
    dataset: Mapping[str, Dataset] | tuple[Dataset, Dataset],
    num_tasks: int | None = None,
    label_column: str = "label",
    **settings: Any,
) -> Scenario:
    """Divides the classes of a data set into tasks whose number is known at test (van de Ven et al. 2022).

    The easier protocol: confusion between tasks cannot happen, so accuracies do not compare with those of
    `class_incremental`. The trainer hands the numbers to the model as `task_ids`.

    Args:
        dataset, num_tasks, label_column, **settings: as for `class_incremental`.

    Returns:
        The scenario, named `"task-incremental"`.

    Raises:
        ValueError, TypeError: as `class_incremental`.

    Example:
        >>> scenario = task_incremental(load_dataset("uoft-cs/cifar100"), 10, "fine_label")    # doctest: +SKIP
        >>> scenario.task_known                                                                # doctest: +SKIP
        True
    """
    check_settings(task_incremental, settings)
    scenario = class_incremental(dataset, num_tasks, label_column, **settings)
    return scenario.changed(scenario, name="task-incremental", task_known=True)
