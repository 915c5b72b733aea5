"""Metrics of a task sequence, from its accuracy matrix, its predictions or its counts, and the record of a run."""

from __future__ import annotations

from pathlib import Path

from .chance import chance_level, standard_error
from .matrix import (
    average_incremental_accuracy,
    backward_transfer,
    continual_metrics,
    final_average_accuracy,
    finished_tasks,
    forgetting,
    forward_transfer,
    intransigence,
    overall_accuracy,
    per_step_forgetting,
)
from .predictions import accuracy_matrix, class_accuracies, task_identification_accuracy
from .results import RunResults
from .scores import confusion_matrix, f1, top_k_accuracy
from .table import results_table
from .usage import usage_entropy, usage_overlap, usage_shares


#: What `evaluate.load` takes for all metrics together.
MODULE = str(Path(__file__).with_name("continual_learning"))

__all__ = [
    "MODULE",
    "RunResults",
    "accuracy_matrix",
    "average_incremental_accuracy",
    "backward_transfer",
    "chance_level",
    "class_accuracies",
    "confusion_matrix",
    "continual_metrics",
    "f1",
    "final_average_accuracy",
    "finished_tasks",
    "forgetting",
    "forward_transfer",
    "intransigence",
    "overall_accuracy",
    "per_step_forgetting",
    "results_table",
    "standard_error",
    "task_identification_accuracy",
    "top_k_accuracy",
    "usage_entropy",
    "usage_overlap",
    "usage_shares",
]
