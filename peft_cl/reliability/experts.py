"""Task identification read out: which task's prompts the keys chose for an image."""

from __future__ import annotations

import torch

from ..tuners.base.model import PromptPoolModel


def rows_of_a_task(tuner: PromptPoolModel) -> int | None:
    """How many rows of its own each task has in the active adapter's pool, one task's behind the other's.

    Returns:
        `None` where a chosen row says no task: all tasks share the rows, the pool learnt in the first task alone, or
        there is one task.
    """
    config, rows = tuner.peft_config[tuner.active_adapters[0]], tuner.pool.rows_in_use
    own = not getattr(config, "shares_rows", True) or getattr(config, "use_prompt_mask", False)
    learns = not config.stream and config.train_prompts == "every_task" and config.num_tasks > 1
    if not (own and learns and rows) or rows % config.num_tasks:
        return None
    return rows // config.num_tasks


def expert_tasks(tuner: PromptPoolModel) -> torch.Tensor | None:
    """The task of the rows that the last call chose for each image: (B,) int64, from 0.

    DualPrompt has an expert for each task, and its keys choose one: the task that the query looks like, whatever class
    the head predicts then. Where several rows are chosen (L2P with `use_prompt_mask`, keys for each layer), it is the
    task that most of them belong to; of equal ones the first.

    Args:
        tuner: `model.base_model`, after a call of the model in evaluation mode.

    Returns:
        `None` where nothing is chosen, or a row says no task (`rows_of_a_task`).

    Example:
        >>> model(pixel_values=pixel_values)       # doctest: +SKIP
        >>> expert_tasks(model.base_model)         # doctest: +SKIP
        tensor([0, 2, 2])
    """
    size, selected = rows_of_a_task(tuner), tuner.head.last_selected
    if size is None or selected is None:
        return None
    rows = selected if selected.ndim == 2 else selected.movedim(0, 1).flatten(1)  # (B, choices)
    return (rows // size).mode(dim=-1).values
