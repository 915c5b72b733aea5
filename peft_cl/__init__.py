"""Prompt-pool continual learning for Hugging Face vision models: L2P, DualPrompt and CODA-Prompt as PEFT adapters."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .exporting import export_adapter
    from .heads import Head, SolvedHead, Sums, register_head
    from .hub import HubError, push_adapter
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
    from .trainer import ContinualTrainer, ContinualTrainingArguments, Strategy, register_strategy
    from .tuners import (
        CodaPromptConfig,
        CodaPromptModel,
        DualPromptConfig,
        DualPromptModel,
        L2PConfig,
        L2PModel,
        LinearProbeConfig,
        LinearProbeModel,
        join_adapters,
        split_adapter,
        suggested_pool_size,
    )

#: Module -> its public names. It is imported when one of them is first asked for: `datasets`, which scenarios and the
#: trainer need, takes longer to import than all else here, and who loads an adapter needs none of it.
NAMES = {
    "exporting": ("export_adapter",),
    "heads": ("Head", "SolvedHead", "Sums", "register_head"),
    "hub": ("HubError", "push_adapter"),
    "metrics": ("RunResults", "continual_metrics", "results_table"),
    "predicting": ("Prediction", "classify"),
    "scenarios": (
        "RandomResizedCropFlip",
        "Scenario",
        "Task",
        "class_incremental",
        "dataset_sequence",
        "domain_incremental",
        "open_image",
        "task_free",
        "task_incremental",
        "to_rgb",
    ),
    "trainer": ("ContinualTrainer", "ContinualTrainingArguments", "Strategy", "register_strategy"),
    "tuners": (
        "CodaPromptConfig",
        "CodaPromptModel",
        "DualPromptConfig",
        "DualPromptModel",
        "L2PConfig",
        "L2PModel",
        "LinearProbeConfig",
        "LinearProbeModel",
        "join_adapters",
        "split_adapter",
        "suggested_pool_size",
    ),
    "version": ("__version__",),
}
MODULE_OF = {name: module for module, names in NAMES.items() for name in names}
#: Parts of the package that are found as its attributes.
PARTS = (
    "assets",
    "heads",
    "hub",
    "metrics",
    "plots",
    "predicting",
    "reliability",
    "scenarios",
    "serving",
    "strategies",
    "trainer",
    "tuners",
)

__all__ = [*MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in PARTS:
        return import_module(f".{name}", __name__)
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *PARTS})


def _is_command() -> bool:
    """Whether this process is `peft-cl` or `python -m peft_cl.cli`, whose `--help` shall not wait for torch."""
    started = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""  # "-m" until the module is found
    return started in ("peft-cl", "peft-cl.exe") or (started == "-m" and "peft_cl.cli" in sys.orig_argv)


if not _is_command():
    from . import tuners  # noqa: F401  makes the methods known to PEFT
