"""Which classes are in which task, as a run says before it starts."""

from __future__ import annotations

from ..scenarios import Scenario


#: How many tasks, classes of a task and letters of a name are shown.
TASKS, CLASSES, LETTERS = 20, 12, 40


def list_tasks(scenario: Scenario) -> str:
    """Return a line for each of the first tasks: its number, name and the first of its classes."""
    lines = []
    for task in scenario[:TASKS]:
        classes = ", ".join(map(_short, task.classes[:CLASSES]))
        more = f", ... ({len(task.classes):,} in all)" if len(task.classes) > CLASSES else ""
        lines.append(f"{f'  {_short(task.name)}:':<15}{classes}{more}")
    if len(scenario) > TASKS:
        lines.append(f"  ... ({len(scenario):,} tasks in all)")
    return "\n".join([*lines, ""])


def _short(name: str) -> str:
    """A name as text that a terminal may show."""
    name = name if len(name) <= LETTERS else f"{name[: LETTERS - 3]}..."
    return name if name.isprintable() else repr(name)
