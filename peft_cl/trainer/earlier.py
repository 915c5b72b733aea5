"""What an adapter has learnt before a run: its tasks, the record of them, and their test images where given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers.utils import logging

from ..metrics import RunResults
from ..metrics.results import FILE_NAME
from ..scenarios import Scenario, Task
from ..tuners.base.config import PromptPoolConfig
from ..tuners.base.model import PromptPoolModel
from ..tuners.base.saved import file_beside
from .images_of_tasks import images_of_tasks


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EarlierTasks:
    """The tasks that an adapter had learnt when a run began.

    Attributes:
        names: their names, those on record or `"task_<number>"`.
        classes: names of the classes of each.
        record: the record of the runs that taught them; None where there is none that fits.
        unrecorded: how many of the first tasks the record does not know, as records of earlier versions, which hold
            one run alone.
        tests: those that there are test images of, with indices below 0: the scenario's first task has index 0.
    """

    names: tuple[str, ...] = ()
    classes: tuple[tuple[str, ...], ...] = ()
    record: RunResults | None = None
    unrecorded: int = 0
    tests: tuple[Task, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.names)

    @property
    def recorded(self) -> slice:
        """Places of the tasks on record."""
        end = self.unrecorded + (self.record.finished_tasks if self.record else 0)
        return slice(self.unrecorded, end)

    def on_record(self, values: Any, missing: Any) -> list[Any]:
        """A value for each task: those on record, and `missing` for the others."""
        found = [missing] * len(self)
        if self.record is not None:
            found[self.recorded] = list(values)[: self.record.finished_tasks]
        return found

    @property
    def matrix(self) -> np.ndarray:
        """Accuracies on record, (tasks, tasks), NaN where there are none."""
        matrix = np.full((len(self), len(self)), np.nan)
        if self.record is not None:
            done = self.record.finished_tasks
            matrix[self.recorded, self.recorded] = np.array(self.record.accuracy_matrix, dtype=float)[:done, :done]
        return matrix

    @property
    def test_sizes(self) -> list[int]:
        """Numbers of test images of each task: of those given, else on record; 0 where they are not known."""
        sizes = self.on_record(self.record.test_sizes if self.record else (), 0)
        for task in self.tests:
            sizes[len(self) + task.index] = len(task.test)
        return sizes

    def named_on(self, scenario: Scenario) -> Scenario:
        """The scenario with its tasks' names as the adapter's record goes on: numbers count on, and no name comes
        twice."""
        if not len(self):
            return scenario
        names = set(self.names)
        tasks = []
        for task in scenario:
            name = task.name
            if name == f"task_{task.index}":
                name = f"task_{len(self) + task.index}"
            name = _unused(name, names)
            tasks.append(task if name == task.name else replace(task, name=name))
            names.add(name)
        return scenario.changed(tasks)

    def with_tests(self, data: Any, scenario: Scenario) -> EarlierTasks:
        """These tasks with the test images that `data` has of them, in the columns of `scenario`.

        Raises:
            ValueError, TypeError: as `images_of_tasks`, or there are no earlier tasks.
        """
        if data is None:
            return self
        if not len(self):
            raise ValueError(
                "earlier_test is given, but the adapter has learnt no task before this run. Leave it out, or load the "
                "adapter by PeftModel.from_pretrained(base, folder, is_trainable=True)."
            )
        tests = images_of_tasks("earlier_test", data, self.names, self.classes, scenario, first=-len(self))
        before = self.on_record(self.record.test_sizes if self.record else (), None)
        for task in tests:
            size = before[len(self) + task.index]
            if size not in (None, 0, len(task.test)):
                logger.warning(
                    "%s was measured on %s test images before, and is measured on the %s of earlier_test from now on: "
                    "forgetting compares the two.",
                    task.name,
                    size,
                    len(task.test),
                )
        return replace(self, tests=tuple(tests))


def earlier_tasks(model: Any) -> EarlierTasks:
    """The tasks that the active adapter of `model` has learnt, with their record if there is one where the adapter was
    loaded from, or of the trainer that taught it in this process."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, PromptPoolModel):
        return EarlierTasks()
    config = model.peft_config[model.active_adapter]
    if not config.tasks:
        return EarlierTasks()
    classes = tuple(tuple(config.classes[row] for row in rows) for rows in config.tasks)
    record, unrecorded = _record_of(config)
    names: list[str] = []
    for number in range(len(classes)):
        known = record is not None and 0 <= number - unrecorded < record.finished_tasks
        name = record.task_names[number - unrecorded] if known else f"task_{number}"
        if unrecorded and name == f"task_{number - unrecorded}":  # an earlier version counted each run from 0
            name = f"task_{number}"
        names.append(_unused(name, set(names)))
    return EarlierTasks(tuple(names), classes, record, unrecorded)


def _unused(name: str, names: set[str]) -> str:
    """`name`, or with a number behind it that makes it one of its own."""
    if name not in names:
        return name
    return next(each for number in range(2, len(names) + 3) if (each := f"{name} ({number})") not in names)


def _record_of(config: PromptPoolConfig) -> tuple[RunResults | None, int]:
    """The record that fits the adapter, and how many tasks there were before its first."""
    for record in _records(config):
        before = record.hyperparameters.get("tasks_learnt_before", 0)
        for first in (0, before if isinstance(before, int) else 0):
            if record.finished_tasks and first + record.finished_tasks <= config.num_tasks:
                is_whole = first + record.finished_tasks == config.num_tasks
                if _same_classes(record, config, first) and (is_whole or not first):
                    return record, first
    return None, 0


def _same_classes(record: RunResults, config: PromptPoolConfig, first: int) -> bool:
    """Whether the finished tasks on record have as many classes as the adapter's from `first` on, and if they begin
    with its first task, the same ones in the same order."""
    counts = record.scenario.get("classes_per_task") or []
    order = [str(name) for name in record.scenario.get("class_order") or []]
    done = range(record.finished_tasks)
    if len(counts) < len(done) or any(counts[task] != len(config.tasks[first + task]) for task in done):
        return False
    known = 1 + max(max(rows, default=-1) for rows in config.tasks[first : first + len(done)])
    if first:
        own = {config.classes[row] for rows in config.tasks[first : first + len(done)] for row in rows}
        return own <= set(order)
    return order[:known] == config.classes[:known]


def _records(config: PromptPoolConfig) -> list[RunResults]:
    """Records that may be the adapter's, the likeliest first."""
    found = [config.record] if getattr(config, "record", None) is not None else []
    for path in _files(config.source):
        try:
            found.append(RunResults.load(path))
        except (ValueError, OSError) as error:
            logger.warning("The record of the adapter cannot be read, so its history does not go on: %s", error)
    return found


def _files(source: tuple[str, Mapping[str, Any]] | None) -> list[Path]:
    if source is None:
        return []
    name, words = source
    folder = Path(name, words.get("subfolder") or "")
    if Path(name).is_dir():  # an adapter that is not named "default" lies one folder below its record
        places = [folder, *([] if (folder.parent / CONFIG_NAME).is_file() else [folder.parent])]
        return [place / FILE_NAME for place in places if (place / FILE_NAME).is_file()]
    found = file_beside((name, {**words, "subfolder": None}), FILE_NAME)  # of the run, above its adapters
    return [] if found is None else [found]
