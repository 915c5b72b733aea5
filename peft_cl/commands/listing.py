"""Which classes are in which task, as a run says before it starts."""

from __future__ import annotations

from ..scenarios import Scenario
from ..text import plain


#: How many tasks, classes of a task and letters of a name are shown.
TASKS, CLASSES, LETTERS = 20, 12, 40


def list_tasks(scenario: Scenario) -> str:
    """Return a line for each of the first tasks: its number, name and the first of its classes."""
    lines = []
    for task in scenario[:TASKS]:
        classes = ", ".join(plain(name, LETTERS) for name in task.classes[:CLASSES])
        more = f", ... ({len(task.classes):,} in all)" if len(task.classes) > CLASSES else ""
        lines.append(f"{f'  {plain(task.name, LETTERS)}:':<15}{classes}{more}")
    if len(scenario) > TASKS:
        lines.append(f"  ... ({len(scenario):,} tasks in all)")
    return "\n".join([*lines, ""])
