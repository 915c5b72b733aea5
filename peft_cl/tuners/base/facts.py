"""What a configuration says of an adapter that has learnt: whether it can be so, on whichever way it was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...text import brief


if TYPE_CHECKING:
    from .config import PromptPoolConfig
    from .pool_config import PoolConfig


#: Weights of terms above it only overflow: logits are float32.
LARGEST_WEIGHT = 1e6
_REMEDY = "The configuration is damaged: restore it, or save the adapter anew."


def check_facts(config: PromptPoolConfig) -> None:
    """Refuse types and values that no `begin_task` writes.

    Raises:
        ValueError: it names the fact, its value and the rule.
    """
    for name in ("head", "head_features", "base_model_name_or_path", "revision", "task_type"):
        value = getattr(config, name)
        if not isinstance(value, str) and (value is not None or name == "head"):
            raise ValueError(f"{name} is {brief(value)}, but must be a text. {_REMEDY}")
    if config.auto_mapping is not None and not isinstance(config.auto_mapping, dict):
        raise ValueError(f"auto_mapping is {brief(config.auto_mapping)}, but must be a dict. {_REMEDY}")
    _check_digests(config.base_weights)
    classes, tasks = _checked_classes(config.classes, bool(config.tasks)), _checked_tasks(config.tasks)
    if tasks:
        _check_rows(tasks, len(classes))
    if config.stream and len(tasks) != 1:
        raise ValueError(f"stream is True, but tasks are {brief(config.tasks)}, and a stream is one. {_REMEDY}")
    if config.rows_in_use is not None and not _is_count(config.rows_in_use):
        raise ValueError(f"rows_in_use is {brief(config.rows_in_use)}, but must be a whole number from 0. {_REMEDY}")


def check_joined(config: PoolConfig) -> None:
    """Refuse parts of a joined adapter that its rows and tasks do not divide into."""
    joined = config.joined
    if joined is None:
        return
    are_pairs = isinstance(joined, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_count, pair)) and pair[1] for pair in joined
    )
    if not are_pairs or not joined or sum(tasks for _, tasks in joined) >= config.num_tasks:
        raise ValueError(
            f"joined is {brief(joined)}, but must hold the rows and tasks of each adapter but the last, which has "
            f"some of the {config.num_tasks} tasks too. {_REMEDY}"
        )
    own, shared = config.rows_per_task, config.rows_per_task is None and isinstance(config.pool_size, int)
    each = 1 if config.train_prompts == "first_task" else None
    wrong = own is not None and any(rows != own * (each or tasks) for rows, tasks in joined)
    wrong |= shared and sum(rows for rows, _ in joined) >= config.total_rows
    wrong |= config.is_apart and not all(rows for rows, _ in joined)
    if wrong:
        raise ValueError(
            f"joined is {brief(joined)}, but with these settings the pools of so many tasks have other numbers of "
            f"rows. {_REMEDY}"
        )


def check_rows_in_use(config: PromptPoolConfig, rows: int) -> None:
    """Refuse an adapter that has learnt with other rows than its tasks leave its pool."""
    if config.tasks and config.rows_in_use not in (None, rows):
        raise ValueError(
            f"rows_in_use is {config.rows_in_use}, but after {config.num_tasks} tasks with these settings a pool uses "
            f"{rows}. {_REMEDY}"
        )


def _check_digests(digests: Any) -> None:
    is_digests = isinstance(digests, dict) and all(isinstance(part, str) for pair in digests.items() for part in pair)
    if digests is not None and not is_digests:
        raise ValueError(f"base_weights is {brief(digests)}, but must hold a text for each format. {_REMEDY}")


def _checked_classes(classes: Any, learnt: bool) -> list[str]:
    if classes is None and not learnt:
        return []
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes is {brief(classes)}, but must be a list of names. {_REMEDY}")
    # Before the first task they are the base model's, in which names may come twice.
    if learnt and len(set(classes)) != len(classes):
        seen: set[str] = set()
        twice = next(name for name in classes if name in seen or seen.add(name))
        raise ValueError(f"classes has {brief(twice)} twice, but each class has one row. {_REMEDY}")
    return list(classes)


def _checked_tasks(tasks: Any) -> list[list[int]]:
    if tasks is None:
        return []
    fits = isinstance(tasks, (list, tuple)) and all(
        isinstance(rows, (list, tuple)) and all(_is_count(row) for row in rows) for rows in tasks
    )
    if not fits:
        raise ValueError(
            f"tasks is {brief(tasks)}, but must be a list with the rows of each task's classes, whole numbers from 0. "
            f"{_REMEDY}"
        )
    return [list(rows) for rows in tasks]


def _check_rows(tasks: list[list[int]], classes: int) -> None:
    """Each task has known rows and new ones behind all before, and all rows belong to a task."""
    repeated = next((index for index, rows in enumerate(tasks) if len(set(rows)) != len(rows)), None)
    if repeated is not None:
        raise ValueError(f"Task {repeated} of tasks repeats a row: {brief(tasks[repeated])}. {_REMEDY}")
    if list(dict.fromkeys(row for rows in tasks for row in rows)) != list(range(classes)):
        raise ValueError(
            f"tasks is {brief(tasks)}, but there are {classes} classes, and the rows of new ones follow each other "
            f"from task to task, 0 to {classes - 1}. {_REMEDY}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
