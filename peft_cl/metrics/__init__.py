"""Metrics of a task sequence, from its accuracy matrix, and the record of a run."""

from __future__ import annotations

from .matrix import (
    average_incremental_accuracy,
    backward_transfer,
    continual_metrics,
    final_average_accuracy,
    finished_tasks,
    forgetting,
    forward_transfer,
)
from .results import RunResults, results_table


__all__ = [
    "RunResults",
    "average_incremental_accuracy",
    "backward_transfer",
    "continual_metrics",
    "final_average_accuracy",
    "finished_tasks",
    "forgetting",
    "forward_transfer",
    "results_table",
]
