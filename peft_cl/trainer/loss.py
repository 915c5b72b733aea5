"""A loss of the user's own, tried before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..scenarios import Scenario
from ..tuners.base.config import PromptPoolConfig


def check_loss(loss: Callable[..., Any] | None, scenario: Scenario, config: PromptPoolConfig) -> None:
    """Try the loss on the classes of each task.

    Raises:
        ValueError: It is no function, fails, or gives no loss with a gradient.
    """
    if loss is None:
        return
    form = "Give a function (logits, labels, class_names), such as " + EXAMPLE + "."
    if not callable(loss):
        raise ValueError(f"loss is {loss!r}, but must be a function. {form}")
    known = list(config.classes) if config.tasks else []
    for task in scenario:
        known = list(dict.fromkeys([*known, *(task.classes if scenario.boundaries else scenario.classes)]))
        names = tuple(task.classes if config.train_mask else known)
        logits = torch.zeros(len(names), len(names), requires_grad=True)
        labels = torch.arange(len(names))
        try:
            value = loss(logits, labels, names)
        except Exception as error:  # whatever it may be, it would end the training
            raise ValueError(
                f"loss fails on the {len(names)} classes of task {task.name!r}: {type(error).__name__}: {error}. It "
                f"is called with logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and the classes' names. "
                f"{form}"
            ) from error
        fits = isinstance(value, torch.Tensor) and value.shape in ((), (len(names),)) and value.is_floating_point()
        if not fits or not value.requires_grad:
            found = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r}"
            raise ValueError(
                f"loss gives {found} for the classes of task {task.name!r}, but must give the mean over the batch, or "
                f"a number for each image, computed from the logits by torch. {form}"
            )


#: In messages.
EXAMPLE = "lambda logits, labels, class_names: torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)"
