"""A finished run that is asked for more epochs: its last task goes on from its last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .per_task import of_task
from .snapshot import STATE_FOLDER, snapshot_before, whole_checkpoint


#: How long a task is learnt.
LENGTH = ("num_train_epochs", "max_steps")


def is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the last task of a run is asked for more epochs or steps than it had."""
    before, now = _of_last_task(before), _of_last_task(now)
    more = [now[name] - before[name] for name in LENGTH if name in before]
    return any(each > 0 for each in more) and all(each >= 0 for each in more)


def without_length(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, and of its tasks, that say nothing of how long they are learnt."""
    rest = {name: value for name, value in settings.items() if name not in LENGTH}
    own = {
        task: {name: value for name, value in values.items() if name not in LENGTH}
        for task, values in (rest.pop("per_task", None) or {}).items()
    }
    own = {task: values for task, values in own.items() if values}
    return {**rest, "per_task": own} if own else rest


def _of_last_task(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = settings["scenario"]["task_names"]
    return {**settings, **of_task(settings.get("per_task"), len(names) - 1, names)}


def start_of_last_task(folder: Path, state: Mapping[str, Any], checkpoints: Path) -> dict[str, Any] | None:
    """The snapshot that the last task began with, None if it is the only one: it goes on as after an interruption.

    Args:
        folder: The run's.
        state: The snapshot of its end.
        checkpoints: Folder of the last task's checkpoints.

    Raises:
        ValueError: There is no checkpoint of its end.
    """
    before, finished = snapshot_before(folder / STATE_FOLDER), state["finished_tasks"]
    has_start = before["finished_tasks"] == finished - 1 if before else finished == 1
    if has_start and whole_checkpoint(checkpoints) is not None:
        return before
    last = state["settings"]["scenario"]["task_names"][-1]
    trained = state["learnt"][-1]["took"].get("steps", 0) if state.get("learnt") else True
    why = "there is no checkpoint at its end" if trained else "no step was trained in it: its head is computed"
    raise ValueError(
        f"The run in {str(folder)!r} is finished, and {last} cannot have more epochs, as {why}. Put num_train_epochs "
        "back, or train anew without resume_from_checkpoint; where steps are trained, save_strategy='epoch' keeps the "
        "checkpoints of the last task."
    )
