"""Settings that single tasks have of their own: epochs, steps, learning rate, size of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import SchedulerType

from ..scenarios import Scenario, Task
from ..scenarios.columns import plain
from ..text import brief


if TYPE_CHECKING:
    from .arguments import ContinualTrainingArguments

PerTask = Mapping[str, Mapping[str, Any]]

#: What a task may have of its own. Whatever else is of the whole run.
SETTINGS = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "learning_rate_per_256",
    "learning_rates",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "weight_decay",
)
#: Keys that stand for the scenario's first task, and for all behind it.
FIRST, LATER = "first", "later"
#: A setting, and the one that would overrule it: a task that names the first has nothing of the second.
OVERRULED = {"num_train_epochs": ("max_steps", -1), "learning_rate": ("learning_rate_per_256", None)}
EXAMPLE = "{'first': {'num_train_epochs': 20}}"


def checked(args: ContinualTrainingArguments) -> dict[str, dict[str, Any]] | None:
    """`args.per_task` with its keys as text; None if nothing is set.

    Raises:
        ValueError: no settings by task, a setting that a task cannot have of its own, or a value that `args` refuses.
    """
    given = args.per_task
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"per_task is {brief(given)}, but must be settings by task, such as {EXAMPLE}.")
    found: dict[str, dict[str, Any]] = {}
    for key, values in (given or {}).items():
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise ValueError(
                f"per_task has the key {brief(key)}, but a key must be a task's number (from 0), its name, {FIRST!r} "
                f"or {LATER!r}: {EXAMPLE}."
            )
        # A file may say 0, and the command line "0".
        found[str(key)] = found.get(str(key), {}) | _checked_values(args, str(key), values)
    return found or None


def _checked_values(args: ContinualTrainingArguments, key: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"per_task of {key!r} is {brief(values)}, but must be settings by name, such as {EXAMPLE}.")
    for name in values:
        if name not in SETTINGS:
            raise ValueError(
                f"per_task of {key!r} names {brief(name)}, but a task may have of its own {', '.join(SETTINGS)}. Name "
                "these; set all else for the whole run."
            )
    values = {name: plain(value) for name, value in values.items()}
    try:
        own = dataclasses.replace(args, per_task=None, **_complete(values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"per_task of {key!r}: {error}") from error
    return {name: getattr(getattr(own, name), "value", getattr(own, name)) for name in values}


def check_tasks(args: ContinualTrainingArguments, scenario: Scenario) -> None:
    """Refuse settings of tasks that `scenario` does not have.

    Raises:
        ValueError: a stream, or a task that there is none of; the message lists those that there are.
    """
    if not args.per_task:
        return
    if not scenario.boundaries:
        raise ValueError(
            f"per_task is {brief(args.per_task)}, but a stream has no tasks: one optimizer learns all of it. Leave "
            "per_task out."
        )
    names = [task.name for task in scenario]
    known = {*names, *map(str, range(len(names))), FIRST, LATER}
    unknown = [key for key in args.per_task if key not in known]
    if unknown:
        raise ValueError(
            f"per_task names {brief(unknown[0])}, but the tasks are {brief(names)}. Name one of these or its number, "
            f"0 to {len(names) - 1}, or take {FIRST!r} or {LATER!r} (all behind the first)."
        )


def of_task(per_task: PerTask | None, number: int, names: Sequence[str]) -> dict[str, Any]:
    """The settings that task `number` (from 0) of the tasks `names` has of its own.

    Of two keys that stand for a task the closer one wins, setting by setting: its name before its number, and its
    number before `"first"` and `"later"`. A word that is some task's name stands for that task alone.

    Example:
        >>> per_task = {"later": {"learning_rate": 0.01, "num_train_epochs": 2}, "2": {"max_steps": 50}}
        >>> of_task(per_task, 2, ["birds", "cars", "dogs"])["max_steps"]
        50
        >>> of_task(per_task, 0, ["birds", "cars", "dogs"])
        {}
    """
    words = [word for word in (LATER if number else FIRST, str(number)) if word not in names]
    found: dict[str, Any] = {}
    for key in (*words, names[number]):
        found |= _complete((per_task or {}).get(key, {}))
    return found


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """With what makes them hold: the Trainer would go by the steps of all tasks before the epochs of one."""
    off = dict(OVERRULED[name] for name in values if name in OVERRULED)
    return {**off, **values}


@contextmanager
def settings_of_task(args: ContinualTrainingArguments, scenario: Scenario, task: Task) -> Iterator[None]:
    """Inside the block `args` are those of `task`; behind it they are what they were."""
    own = of_task(args.per_task, task.index, [each.name for each in scenario])
    if not own:
        yield
        return
    before = {name: getattr(args, name) for name in SETTINGS}
    try:
        for name, value in own.items():
            setattr(args, name, SchedulerType(value) if name == "lr_scheduler_type" else value)
        args.scale_rate()  # to the images of the task's own steps
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def for_each_task(
    args: ContinualTrainingArguments, scenario: Scenario, check: Callable[[ContinualTrainingArguments], None]
) -> None:
    """Call `check` with the arguments as each task has them; once if they are the same for all.

    Raises:
        ValueError: what `check` raises, with the task's name if it has settings of its own.
    """
    for task in scenario if args.per_task else scenario[:1]:
        with settings_of_task(args, scenario, task):
            try:
                check(args)
            except ValueError as error:
                if not args.per_task:
                    raise
                raise ValueError(f"Of task {task.name!r}: {error}") from error


def in_words(per_task: PerTask | None, number: int, names: Sequence[str]) -> str:
    """What a task has of its own, for a person; empty if it has nothing.

    Example:
        >>> in_words({"first": {"num_train_epochs": 20}}, 0, ["birds", "cars"])
        'num_train_epochs 20'
    """
    off = dict(OVERRULED.values())
    own = of_task(per_task, number, names)
    return ", ".join(f"{name} {brief(value)}" for name, value in own.items() if name not in off or value != off[name])
