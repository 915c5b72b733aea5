"""Whether a pool does what it is for: other tasks choose other rows."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .results import RunResults

#: `usage_overlap` from which on tasks are said to choose the same rows.
SAME = 0.9


def same_rows(results: RunResults) -> str | None:
    """A sentence or two for users of a pool whose tasks choose the same rows; None where they do not, or nothing was
    counted."""
    overlap = results.usage_metrics().get("usage_overlap", 0.0)
    if overlap < SAME:
        return None
    used = sum(any(task[row] for task in results.prompt_usage) for row in range(len(results.prompt_usage[0])))
    text = (
        f"All tasks choose the same prompts: {used} of {len(results.prompt_usage[0])} rows of the pool are used, and "
        f"the tasks' choices overlap by {overlap:.2f} of 1. The pool then works as one prompt for all tasks."
    )
    adapter = results.hyperparameters.get("adapter", {})
    if adapter.get("use_prompt_mask") is False:
        rows = len(results.task_names) * adapter.get("top_k", 1)
        text += f" use_prompt_mask=True with pool_size={rows} gives each task rows of its own."
    return text
