"""Which classes are in which task, as a run says before it starts."""

from __future__ import annotations

from ..scenarios import Scenario
from ..text import plain
from ..trainer.per_task import PerTask, in_words


#: How many tasks, classes of a task and letters of a name are shown.
TASKS, CLASSES, LETTERS = 20, 12, 40


def list_tasks(scenario: Scenario, per_task: PerTask | None = None) -> str:
    """Return a line for each of the first tasks: its name, the first of its classes, and the settings of its own."""
    lines, names = [], [task.name for task in scenario]
    for task in scenario[:TASKS]:
        classes = ", ".join(plain(name, LETTERS) for name in task.classes[:CLASSES])
        more = f", ... ({len(task.classes):,} in all)" if len(task.classes) > CLASSES else ""
        lines.append(f"{f'  {plain(task.name, LETTERS)}:':<15}{classes}{more}")
        own = in_words(per_task, task.index, names)
        if own:
            lines[-1] += f"; {plain(own)}"
    if len(scenario) > TASKS:
        lines.append(f"  ... ({len(scenario):,} tasks in all)")
    return "\n".join([*lines, ""])
