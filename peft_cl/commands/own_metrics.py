"""The section `metrics`: what is measured beside the accuracies, by the names that the command knows it by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..metrics import confusion_matrix, f1, top_k_accuracy
from ..text import brief
from .errors import CommandError, unknown


METRICS = {
    "top-3-accuracy": partial(top_k_accuracy, 3),
    "top-5-accuracy": partial(top_k_accuracy, 5),
    "macro-f1": partial(f1, "macro"),
    "weighted-f1": partial(f1, "weighted"),
    "confusion-matrix": confusion_matrix,
}


def make_metrics(values: Any) -> list[Callable]:
    """Turn the section, a name or a list of names, into functions for `compute_metrics`.

    Raises:
        CommandError: Something else, an unknown name, or one that comes twice.
    """
    names = [values] if isinstance(values, str) else [] if values is None else values
    if not isinstance(names, list):
        raise CommandError(f"metrics is {brief(values)}, but must be a list of names, such as [macro-f1].")
    for place, name in enumerate(names):
        if not isinstance(name, str) or name not in METRICS:
            raise unknown("metric", name, METRICS)
        if name in names[:place]:
            raise CommandError(f"metrics has {name} twice. Take one out.")
    return [METRICS[name]() for name in names]
