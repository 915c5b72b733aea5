"""Values of metrics of the user's own: what they may be, and what is made of those of several tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..text import brief


#: How deep lists may lie in lists.
DEEPEST = 8


def own_value(value: Any, depth: int = 0) -> float | list:
    """Returns what a metric gives in Python's numbers.

    Args:
        value: A finite number, or lists of numbers in lists, at most 8 deep; arrays and tensors are taken too. NaN and
            `None` stand for what is not measured or not defined.

    Raises:
        ValueError: Something else; the message names it.

    Example:
        >>> own_value(np.array([[2, 0], [1, 3]]))
        [[2, 0], [1, 3]]
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)) and depth < DEEPEST:
        return [own_value(each, depth + 1) for each in value]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan  # always the same object: lists compare by identity first
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"{brief(value)} is neither a finite number nor a list of such, at most {DEEPEST} deep.")
    return value


def own_values(metrics: Mapping[str, Sequence[Any]], tasks: int) -> dict[str, list]:
    """Returns the field `own_metrics` of a record: by name a value for each finished task.

    Raises:
        ValueError: Something else, or another number of values.
    """
    if not isinstance(metrics, Mapping):
        raise ValueError(f"own_metrics is {brief(metrics)}, but must be lists of values by name, or None.")
    for name, values in metrics.items():
        if not isinstance(values, (list, tuple)) or len(values) != tasks:
            raise ValueError(
                f"own_metrics[{brief(name)}] is {brief(values)}, but must be a list of one value for each of "
                f"{tasks} finished tasks."
            )
    return {name: [own_value(each) for each in values] for name, values in metrics.items()}


def means_over_tasks(metrics: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Returns the mean over the tasks of each metric that is a number; NaN where a task has none.

    Example:
        >>> means_over_tasks({"macro_f1": [0.5, 0.75], "confusion_matrix": [[[1]], [[2]]]})
        {'macro_f1': 0.625}
    """
    return {
        name: float(np.mean(values))
        for name, values in metrics.items()
        if values and not any(isinstance(each, list) for each in values)
    }
