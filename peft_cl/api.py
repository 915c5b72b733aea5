"""The public names, which `peft_cl` has as its own; importing them makes the methods known to PEFT."""

from __future__ import annotations

from .heads import Head, SolvedHead, Sums, register_head
from .metrics import RunResults, continual_metrics, results_table
from .predicting import Prediction, classify
from .scenarios import (
    RandomResizedCropFlip,
    Scenario,
    Task,
    class_incremental,
    dataset_sequence,
    domain_incremental,
    open_image,
    task_free,
    task_incremental,
    to_rgb,
)
from .trainer import ContinualTrainer, ContinualTrainingArguments, Strategy
from .tuners import (
    CodaPromptConfig,
    CodaPromptModel,
    DualPromptConfig,
    DualPromptModel,
    L2PConfig,
    L2PModel,
    LinearProbeConfig,
    LinearProbeModel,
)
from .version import __version__


__all__ = [
    "CodaPromptConfig",
    "CodaPromptModel",
    "ContinualTrainer",
    "ContinualTrainingArguments",
    "DualPromptConfig",
    "DualPromptModel",
    "Head",
    "L2PConfig",
    "L2PModel",
    "LinearProbeConfig",
    "LinearProbeModel",
    "Prediction",
    "RandomResizedCropFlip",
    "RunResults",
    "Scenario",
    "SolvedHead",
    "Strategy",
    "Sums",
    "Task",
    "__version__",
    "class_incremental",
    "classify",
    "continual_metrics",
    "dataset_sequence",
    "domain_incremental",
    "open_image",
    "register_head",
    "results_table",
    "task_free",
    "task_incremental",
    "to_rgb",
]
