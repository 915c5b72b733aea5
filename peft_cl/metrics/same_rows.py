"""Whether a pool does what it is for: other tasks choose other rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any


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
    has_tasks = results.scenario.get("boundaries", True)
    return text + ways_to_other_rows(results.hyperparameters.get("adapter", {}), len(results.task_names), has_tasks)


def ways_to_other_rows(adapter: Mapping[str, Any], tasks: int, has_tasks: bool = True) -> str:
    """What makes so many tasks choose other rows, in a sentence or two; empty for a method that has no such option.

    Args:
        adapter: the settings of the adapter, as the record has them; those at their defaults may be missing.
        tasks: how many tasks there are to be.
        has_tasks: whether they are learnt as such, not from a stream, to which rows of a task's own mean nothing.
    """
    if adapter.get("use_prompt_mask") is not False:
        return ""
    left = ["frequency_penalty=True"] if has_tasks and not adapter.get("frequency_penalty") else []
    left += ["entropy_coefficient=0.1"] if not adapter.get("entropy_coefficient") else []
    left += ["key_init='queries'"] if adapter.get("key_init", "init") == "init" else []
    spread = f"spread the choices among shared rows: {', '.join(left)}." if left else ""
    if not has_tasks:
        return f" To {spread}" if spread else ""
    rows = tasks * adapter.get("top_k", 1)
    text = f" use_prompt_mask=True with pool_size={rows} gives each task rows of its own."
    return text + (f" Or {spread}" if spread else "")
